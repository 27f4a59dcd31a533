"""The page of a layer with 30,000 experts: seconds that `mxd-lens report` takes to write it, and
in Chromium to open, to filter, to click; the same with another layer's as many experts beside them.

    python -m tests.benchmarks.bench_report [n_experts] [screenshots, a folder]

The experts are made up, each as large as one of a real layer: 16 contexts in 800 texts of 127
tokens, 8 tokens promoted and 8 suppressed, 5 + 5 experts like it, a steered sample. So are the
firings by which those of the other layer are found: 32 experts of each at each token.
"""

from __future__ import annotations

import io
import random
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from selenium import webdriver

from mxd_lens.analysis.experts.contexts import QUANTILES
from mxd_lens.analysis.experts.corpus import Firings
from mxd_lens.analysis.experts.effects import short
from mxd_lens.analysis.experts.nearest import coactive
from mxd_lens.cli import main as mxd_lens
from mxd_lens.runs.results import Beside, Nearest, OtherLayer, write
from tests.helpers import write_run
from tests.unit.test_report import EXPERTS, context, expert

N_TEXTS, N_TOKENS, K = 800, 127, 32
LIMIT = 2.0


def words(n: int, draw: random.Random) -> list[str]:
    """Made-up tokens, a space before most."""
    syllables = ["ka", "lo", "mi", "ren", "tu", "sho", "per", "in", "ast", "ou"]
    made = ("".join(draw.choices(syllables, k=draw.randint(1, 3))) for _ in range(n))
    return [f" {word}" if draw.random() < 0.8 else word for word in made]


def made_up(n_experts: int, seed: int = 0) -> dict[str, Any]:
    """As experts.json has it."""
    draw = random.Random(seed)
    vocabulary = words(49_152, draw)

    def tokens() -> list[list[Any]]:
        return [[token, round(draw.random(), 4)] for token in draw.choices(vocabulary, k=8)]

    def others() -> list[list[Any]]:
        return [[draw.randrange(n_experts), round(draw.random(), 4)] for _ in range(5)]

    def contexts() -> list[dict[str, Any]]:
        quantiles = [1.0] * 10 + [q for q in QUANTILES for _ in range(2)]
        places = ((draw.randrange(N_TEXTS), draw.randrange(N_TOKENS)) for _ in quantiles)
        return [
            context(*place, round(draw.random() * 4, 4), quantile)
            for place, quantile in zip(places, quantiles, strict=True)
        ]

    experts = [
        expert(
            i,
            name=" · ".join(token.strip() for token in draw.choices(vocabulary, k=3)),
            density=round(draw.random() ** 4, 6),
            coherence=round(draw.random(), 4),
            agreement=round(draw.random(), 4),
            meaningful=draw.random() < 0.1,
            histogram=[draw.randrange(2000) for _ in range(20)],
            contexts=contexts(),
            promoted=tokens(),
            suppressed=tokens(),
            nearest=others(),
            coactive=others(),
            sample="".join(draw.choices(vocabulary, k=30)),
        )
        for i in range(n_experts)
    ]
    texts = [draw.choices(vocabulary, k=N_TOKENS) for _ in range(N_TEXTS)]
    sizes = {"n_tokens": N_TEXTS * N_TOKENS, "n_live": n_experts, "d_sae": n_experts}
    return EXPERTS | sizes | {"texts": texts, "experts": experts}


def fire(n_experts: int, seed: int) -> Firings:
    """Some experts far more often than others."""
    rng = np.random.default_rng(seed)
    often = np.arange(1, n_experts + 1) ** -0.5
    n = N_TEXTS * N_TOKENS
    expert = rng.choice(n_experts, (n, K), p=often / often.sum()).astype(np.int32)
    expert.sort()
    once = np.diff(expert, prepend=-1) > 0
    token = np.repeat(np.arange(n, dtype=np.int32), K).reshape(n, K)
    return Firings.sort(expert[once], token[once], rng.random(once.sum(), np.float32))


def beside(experts: dict[str, Any]) -> OtherLayer:
    """A layer of as many experts, as beside.json has it."""
    n = experts["d_sae"]
    firings, others = fire(n, 1), fire(n, 2)
    found = timed(
        f"nearest of {n:,} experts to {n:,}",
        lambda: coactive(firings, experts["n_tokens"], others=others),
    )
    near = [[(i, short(score)) for i, score in of] for of in found]
    return OtherLayer(
        run="../other",
        label="another layer",
        text={name: experts[name] for name in ("model_name", "dataset", "n_tokens")},
        jaccard=0.5,
        jaccard_by_chance=0.5,
        experts=[
            Nearest(id=i, nearest=of) for i, of in zip(firings.live.tolist(), near, strict=True)
        ],
    )


def timed(what: str, work: Callable[[], Any]) -> Any:
    """What it returns, after saying which seconds passed and were computed."""
    passed, computed = time.perf_counter(), time.process_time()
    made = work()
    passed, computed = time.perf_counter() - passed, time.process_time() - computed
    print(f"  {what:<36} {passed:8.2f} {computed:8.2f}", flush=True)
    return made


def open_browser() -> webdriver.Chrome:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    options.page_load_strategy = "none"  # for its experts are listed before it is complete
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
        options.add_argument(f"--{argument}")
    return webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))


ACT = """
const [act, isDone] = [arguments[0], `return ${arguments[1]}`].map((body) => new Function(body));
const start = performance.now();
window.took = null;
act();
(function look() {
  const stop = () => { window.took = (performance.now() - start) / 1000; };
  if (isDone()) requestAnimationFrame(stop);
  else setTimeout(look, 5);
})();
"""
FEWER = "!document.getElementById('status').textContent.startsWith(({n}).toLocaleString('en'))"
STEPS = {
    "filter by a word": (
        "const s = document.getElementById('search'); s.value = 'karen'; "
        "s.dispatchEvent(new Event('input'))",
        "true",
    ),
    "by two, once more": (
        "const s = document.getElementById('search'); s.value = 'karen mi'; "
        "s.dispatchEvent(new Event('input'))",
        "true",
    ),
    "all again": (
        "const s = document.getElementById('search'); s.value = ''; "
        "s.dispatchEvent(new Event('input'))",
        "true",
    ),
    "filter by a number": (
        "const f = document.getElementById('least-coherence'); f.value = '0.5'; "
        "f.dispatchEvent(new Event('input', {bubbles: true}))",
        FEWER,
    ),
    "by another, too": (
        "const f = document.getElementById('most-density'); f.value = '1'; "
        "f.dispatchEvent(new Event('input', {bubbles: true}))",
        FEWER,
    ),
    "and meaningful": (
        "document.getElementById('meaningful').click()",
        FEWER,
    ),
    "no filter": (
        "document.querySelector('#filters form').reset()",
        f"!({FEWER})",
    ),
    "sort": (
        "const o = document.getElementById('order'); o.value = 'density'; "
        "o.dispatchEvent(new Event('change'))",
        "true",
    ),
    "to the end of the list": (
        "document.getElementById('list').dispatchEvent(new KeyboardEvent('keydown', {key: 'End'}))",
        "document.querySelector('.active')",
    ),
    "click": (
        "document.querySelectorAll('[role=option]')[3].click()",
        "document.querySelectorAll('#detail .context').length == 16",
    ),
    "click another": (
        "location.hash = location.hash.replace(/[0-9]+/, 17000 % {n})",
        "document.querySelector('#detail h3').textContent.startsWith('#' + 17000 % {n}) && "
        "document.querySelectorAll('#detail .context').length == 16",
    ),
}
"""What is done, and by what one sees that it is."""
STEPS_BESIDE = {
    "click, the first": (
        "document.querySelectorAll('[role=option]')[3].click()",
        "document.querySelectorAll('#detail .context').length == 32",
    ),
    "click another": (
        "location.hash = '#expert=' + 17000 % {n}",
        "document.querySelector('#detail h3').textContent.startsWith('#' + 17000 % {n}) && "
        "document.querySelectorAll('#detail .context').length == 32",
    ),
    "another of the other's": (
        "document.querySelectorAll('.near a')[3].click()",
        "document.querySelectorAll('.near a')[3].getAttribute('aria-current') && "
        "document.querySelectorAll('#detail .context').length == 32",
    ),
}
"""The same with another layer's experts beside them."""


class Clock:
    """Seconds that pass, and those that the page's main thread computes for."""

    def __init__(self, driver: webdriver.Chrome):
        self.driver = driver
        driver.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
        self.start()

    def start(self) -> None:
        self.passed, self.computed = time.perf_counter(), self._computed()

    def _computed(self) -> float:
        metrics = self.driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
        return next(each["value"] for each in metrics if each["name"] == "TaskDuration")

    def say(self, what: str, passed: float | None = None) -> None:
        passed = passed or time.perf_counter() - self.passed
        late = "  too long" if passed > LIMIT else ""
        print(
            f"  {what:<36} {passed:8.2f} {self._computed() - self.computed:8.2f}{late}", flush=True
        )


def measure(
    page: Path, n_experts: int, steps: dict[str, tuple[str, str]], screenshots: Path | None
) -> None:
    with open_browser() as driver:
        driver.set_window_size(1300, 1000)
        driver.get("about:blank")
        clock = Clock(driver)
        driver.get(page.as_uri())
        while not driver.find_elements("css selector", "[role=option]"):
            time.sleep(0.01)
        clock.say("open, experts listed")
        while driver.execute_script("return document.readyState") != "complete":
            time.sleep(0.01)
        clock.say("open, figures as well")
        for what, (act, done) in steps.items():
            script = [part.replace("{n}", str(n_experts)) for part in (act, done)]
            clock.start()
            driver.execute_script(ACT, *script)
            end = time.monotonic() + 60
            while (took := driver.execute_script("return window.took")) is None:
                assert time.monotonic() < end, what
                time.sleep(0.1)
            clock.say(what, took)
        nodes = driver.execute_script("return document.querySelectorAll('*').length")
        heap = driver.execute_script("return performance.memory.usedJSHeapSize") / 1e6
        print(f"  {nodes:,} elements, {heap:,.0f} MB of JavaScript's")
        if screenshots:
            driver.save_screenshot(str(screenshots / f"{page.parent.name}-{n_experts}.png"))


def report(run: Path) -> Path:
    """The page, as the command writes it."""

    def command() -> None:
        with redirect_stdout(io.StringIO()):
            mxd_lens(["report", str(run)])

    timed("mxd-lens report", command)
    page, file = run / "report.html", run / "experts.json"
    beside = sum(path.stat().st_size for path in run.glob("report-*/*")) / 1e6
    print(
        f"  {file.stat().st_size / 1e6:.0f} MB of experts.json, a page of "
        f"{page.stat().st_size / 1e6:.0f} MB and {beside:.0f} MB beside it",
        flush=True,
    )
    return page


def main(n_experts: int, screenshots: Path | None = None) -> None:
    with TemporaryDirectory() as folder:
        experts = made_up(n_experts)
        run = write_run(Path(folder) / "one", experts=experts)
        print(f"{f'{n_experts:,} experts; seconds':<38} {'passed':>8} {'computed':>8}")
        measure(report(run), n_experts, STEPS, screenshots)
        print("as many of another layer beside them")
        run = run.rename(run.with_name("two"))
        write_run(run.with_name("other"), "topk_transcoder", experts=made_up(n_experts, seed=1))
        write(run / "beside.json", Beside(layers=[beside(experts)]))
        measure(report(run), n_experts, STEPS_BESIDE, screenshots)


if __name__ == "__main__":
    main(int((sys.argv[1:] or ["30000"])[0]), *map(Path, sys.argv[2:3]))
