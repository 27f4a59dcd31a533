"""Layers on the Hugging Face hub: what is uploaded of a folder, and the way back.

SAELens uploads the layers and `SAE.from_pretrained` loads them; results, pages and a card go
beside them. Tokens and endpoints are huggingface_hub's business.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCardData, constants, hf_hub_url
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from pydantic import AfterValidator
from sae_lens.constants import (
    RUNNER_CFG_FILENAME,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    SPARSITY_FILENAME,
)
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.saes.sae import SAE
from sae_lens.training.upload_saes_to_huggingface import upload_saes_to_huggingface
from simple_parsing import field as argument

from mxd_lens.demo.wheels import GEMMA3, SMOLLM2, STATE_OF_THE_UNION, WIKIPEDIA, Wheel
from mxd_lens.fields import Flag, PathStr, config
from mxd_lens.models.load import DEMO_MODEL
from mxd_lens.report.card import Source, make_card
from mxd_lens.report.experts import shards_beside
from mxd_lens.report.page import measured_rows, write_report
from mxd_lens.runs.config import TrainConfig, finished_runs, folder_name
from mxd_lens.runs.finetune import TUNED_FILENAME
from mxd_lens.runs.results import (
    Beside,
    Comparison,
    Experts,
    Joint,
    Labels,
    Probes,
    Row,
    Steering,
    plain,
    read,
    read_layer_file,
)

CARD_FILENAME = "README.md"

DEMO_SOURCES: dict[str, tuple[str, str, Wheel]] = {
    DEMO_MODEL: (
        "SmolLM2-135M-Instruct",
        "https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
        SMOLLM2,
    ),
    "demo:gemma3": ("Gemma-3-270M", "https://huggingface.co/google/gemma-3-270m", GEMMA3),
    "demo:wikipedia": ("Wikipedia", "https://en.wikipedia.org", WIKIPEDIA),
    "demo:state-of-the-union": (
        "State of the Union addresses",
        "https://en.wikipedia.org/wiki/State_of_the_Union",
        STATE_OF_THE_UNION,
    ),
}
"""Names, pages and wheels of what is the demo's."""

_RESULTS: dict[str, Any] = {
    "results*.json": Row | Comparison,
    "joint*.json": Joint,
    "experts.json": Experts,
    "beside.json": Beside,
    "labels.json": Labels,
    "probe.json": Probes,
    "steering.json": Steering,
}
"""Files of ours that go up, and what they hold; a page of the same name goes with them."""


def _repo(name: str) -> str:
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"no name of a repository ({error})") from error
    if "/" not in name:
        raise ValueError("name it as USER/REPO, or ORGANIZATION/REPO")
    return name


@config
class PushConfig:
    """Upload a run, or all layers of a comparison, to the Hugging Face hub, with a card.

    Example: mxd-lens push runs/demo me/smollm2-mxd
    """

    run: PathStr = argument(positional=True, metavar="RUN")
    """Output folder of `mxd-lens train`, or of `mxd-lens compare`: all of its layers."""
    repo: Annotated[str, AfterValidator(_repo)] = argument(positional=True, metavar="USER/REPO")
    """Repository of models; a public one is made where there is none."""
    yes: bool = argument(default=False, action=Flag)
    """Upload without asking."""


@dataclass(frozen=True)
class Upload:
    """What will be in a repository: `layers` by id, as SAELens uploads them, other files by their
    path there, and the text of the card."""

    repo: str
    layers: dict[str, Path]
    files: dict[str, Path]
    card: str
    notes: list[str]
    """What whoever uploads should know."""

    def sizes(self) -> dict[str, int]:
        """Bytes of every file, by its path in the repository."""
        of_layers = {
            f"{name}/{file}": (folder / file).stat().st_size
            for name, folder in self.layers.items()
            for file in (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME)
            if (folder / file).exists()
        }
        others = {path: file.stat().st_size for path, file in self.files.items()}
        return {CARD_FILENAME: len(self.card.encode())} | of_layers | others

    def __str__(self) -> str:
        sizes = self.sizes()
        width = max(map(len, sizes))
        lines = [f"  {path:<{width}}  {_bytes(size):>9}" for path, size in sizes.items()]
        total = f"{len(sizes)} files, {_bytes(sum(sizes.values()))}"
        where = f"{constants.ENDPOINT}/{self.repo}"
        return "\n".join([f"To {where}, {total}:", *lines, *self.notes])


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def gather(folder: Path, repo: str) -> Upload:
    """What there is to upload of a run, or of the finished ones of a comparison.

    Layers (safetensors and configurations), settings, results and pages of mxd-lens, and nothing
    else that is in the folder; a report with a browser of experts is written where they were
    inspected. The hub is asked for the licences of model and text.

    Raises:
        ValueError: no finished layers, of several models, or a file that is none of ours.
    """
    finished = finished_runs(folder, one_mlp=False)
    alone = (folder / RUNNER_CFG_FILENAME).exists()
    runs = {_id(run) if alone else Path(run.output).name: run for run in finished}
    files: dict[str, Path] = {} if alone else _results_in(folder)
    if (folder / TUNED_FILENAME).exists():
        files[TUNED_FILENAME] = folder / TUNED_FILENAME
    for name, run in runs.items():
        own = Path(run.output)
        found = {RUNNER_CFG_FILENAME: own / RUNNER_CFG_FILENAME} | _results_in(own)
        if {"experts.json", "results.json"} <= found.keys():
            page = write_report(own)
            found |= {page.name: page} | shards_beside(page)
        files |= {f"{name}/{file}": path for file, path in found.items()}
    some = finished[0]
    model, text = source("model", some.model), source("dataset", some.dataset)
    joint = read(folder / "joint.json", Joint)
    pages = [path for path in files if path.endswith(".html")]
    card = make_card(
        repo,
        runs,
        measured_rows(folder),
        model=model,
        text=text,
        data=ModelCardData(
            base_model=_hub_id(model),
            base_model_relation="adapter" if _hub_id(model) else None,
            datasets=_hub_id(text),
        ),
        widths={name: read_layer_file(run.layer_path)["d_sae"] for name, run in runs.items()},
        joint=plain(joint)["rows"] if joint else (),
        pages={page: hf_hub_url(repo, page) for page in pages},
        tuned=TUNED_FILENAME in files,
        quoted=_quoted(files),
    )
    return Upload(
        repo=repo,
        layers={name: run.layer_path for name, run in runs.items()},
        files=files,
        card=str(card),
        notes=_notes(finished, files),
    )


def _id(run: TrainConfig) -> str:
    return folder_name(run.layer, run.architecture, run.k, run.seed)


def _results_in(folder: Path) -> dict[str, Path]:
    """Results and pages in a folder, by name; ValueError if one is none of ours."""
    found = {}
    for pattern, kind in _RESULTS.items():
        for path in sorted(folder.glob(pattern)):
            read(path, kind)
            page = path.with_suffix(".html")
            found |= {file.name: file for file in (path, page) if file.exists()}
            found |= shards_beside(page)
    return found


def _notes(runs: list[TrainConfig], files: dict[str, Path]) -> list[str]:
    local = [name for name in (runs[0].model, runs[0].dataset) if Path(name).exists()]
    notes = [f"The files name what only you have: {', '.join(local)}."] if local else []
    if _quoted(files):
        notes.append(f"The experts' files and pages quote the text, {runs[0].dataset}.")
    return [*notes, f"A {CARD_FILENAME} that is there is replaced."]


def _quoted(files: dict[str, Path]) -> bool:
    """Whether they quote the text: experts' contexts do."""
    return any(path.endswith("experts.json") for path in files)


def source(kind: str, name: str) -> Source:
    """What a card says of a ``model`` or a ``dataset``, whose licence the hub is asked for."""
    if name in DEMO_SOURCES:
        said, page, wheel = DEMO_SOURCES[name]
        return Source(said, name, page, f"{wheel.licence} (from {wheel} on the package index)")
    if Path(name).exists():
        short = Path(name).name
        return Source(short, f"path/to/{short}", None, "not known to mxd-lens")
    repo, _, part = name.partition(":")
    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{repo}"
    said = f"{repo}, {part}" if part else repo
    api = HfApi()
    try:
        about = api.model_info(repo) if kind == "model" else api.dataset_info(repo)
    except Exception as error:  # of which the upload itself will tell
        if not _reason(error, repo):
            raise
        return Source(said, name, page, "see its page")
    licence = getattr(about.card_data, "license", None)
    return Source(said, name, page, str(licence or "its page names none"))


def _hub_id(of: Source) -> str | None:
    for prefix in (constants.ENDPOINT, "https://huggingface.co"):
        if of.url and of.url.startswith(f"{prefix}/"):
            return of.url.removeprefix(f"{prefix}/").removeprefix("datasets/")
    return None


def send(upload: Upload) -> str:
    """Upload; what is there already and has not changed is not sent again.

    Returns:
        The repository's page.

    Raises:
        ValueError: the hub refuses, or cannot be reached; says what to do.
    """
    with _explained(upload.repo):
        api = HfApi()
        api.whoami()
        upload_saes_to_huggingface({**upload.layers}, upload.repo, add_default_readme=False)
        files: dict[str, Path | bytes] = {**upload.files, CARD_FILENAME: upload.card.encode()}
        api.create_commit(
            upload.repo,
            [CommitOperationAdd(path, file) for path, file in files.items()],
            commit_message="Card, results and pages",
        )
    return f"{constants.ENDPOINT}/{upload.repo}"


def load(repo: str, sae_id: str, device: str = "cpu") -> SAE[Any]:
    """A layer from the Hugging Face hub, as ``SAE.from_pretrained(repo, sae_id)`` gives it.

    Args:
        repo: a repository, or one of SAELens' releases.
        sae_id: the layer's folder in it.

    Raises:
        ValueError: no such repository or layer, an architecture that is not known, or the hub
            cannot be reached.
    """
    with _explained(repo):
        try:
            return SAE.from_pretrained(repo, sae_id, device=device)
        except RemoteEntryNotFoundError as error:
            missing, files = error, HfApi().list_repo_files(repo)
        except KeyError as error:
            if error.args[0] in SAE_CLASS_REGISTRY:
                raise
            raise ValueError(
                f"{sae_id} in {repo} is of an architecture, {error}, that mxd-lens "
                f"{version('mxd-lens')} does not know: upgrade it, or import what registers it"
            ) from error
    has = [Path(file).parent for file in files if Path(file).name == SAE_CFG_FILENAME]
    raise ValueError(
        f"{repo} has no layer {sae_id!r}; it has {', '.join(map(str, has)) or 'none'}"
    ) from missing


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """What the hub or the network refuses, as a ValueError that says what to do."""
    try:
        yield
    except Exception as error:  # huggingface_hub has many kinds, and its HTTP client more
        if why := _reason(error, repo):
            raise ValueError(why) from error
        raise


def _reason(error: BaseException, repo: str) -> str | None:
    """Why the hub said no, and what to do; None if something else is wrong."""
    causes = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    where = constants.ENDPOINT
    who = "run `hf auth login`, or set HF_TOKEN"
    for cause in causes:
        if isinstance(cause, OfflineModeIsEnabled):
            return f"{repo}: HF_HUB_OFFLINE is set, unset it to reach {where}"
        if isinstance(cause, LocalTokenNotFoundError):
            return f"{repo}: you are not logged in at {where}: {who}"
        if isinstance(cause, HfHubHTTPError):
            status = cause.response.status_code
            if isinstance(cause, RepositoryNotFoundError) or status == 404:
                return f"{where} has no {repo}, or hides it from you: check its name; {who}"
            if status == 401:
                return f"{repo}: {where} does not accept your token: {who} to a valid one"
            if status == 403:
                return (
                    f"your token may not write to {repo} ({_said(cause)}): make one that may at "
                    f"{where}/settings/tokens, or name a repository of yours"
                )
            return f"{repo}: {where} answers with status {status} ({_said(cause)}): try again later"
        if type(cause).__module__.partition(".")[0] in ("httpx", "httpx2"):
            return (
                f"{repo}: cannot reach {where} ({cause}): check the network, its proxy and "
                "HF_ENDPOINT; the same command again sends what is missing"
            )
    return None


def _said(error: HfHubHTTPError) -> str:
    return " ".join((error.server_message or str(error)).split())
