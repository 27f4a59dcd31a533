"""The page of a layer with 30,000 experts in Chromium: seconds to open, to filter, to click.

    python -m tests.benchmarks.bench_report [n_experts] [screenshots, a folder]

The experts are made up, each as large as one of a real layer: 16 contexts in 800 texts of 127
tokens, 8 tokens promoted and 8 suppressed, 5 + 5 experts like it, a steered sample.
"""

from __future__ import annotations

import random
import shutil
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from selenium import webdriver

from mxd_lens.analysis.experts.contexts import QUANTILES
from mxd_lens.report.page import write_report
from tests.helpers import write_run
from tests.unit.test_report import EXPERTS, context, expert

N_TEXTS, N_TOKENS = 800, 127
LIMIT = 2.0


def words(n: int, draw: random.Random) -> list[str]:
    """Made-up tokens, a space before most."""
    syllables = ["ka", "lo", "mi", "ren", "tu", "sho", "per", "in", "ast", "ou"]
    made = ("".join(draw.choices(syllables, k=draw.randint(1, 3))) for _ in range(n))
    return [f" {word}" if draw.random() < 0.8 else word for word in made]


def made_up(n_experts: int) -> dict[str, Any]:
    """As experts.json has it."""
    draw = random.Random(0)
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
            f"  {what:<24} {passed:8.2f} {self._computed() - self.computed:8.2f}{late}", flush=True
        )


def measure(page: Path, n_experts: int, screenshots: Path | None) -> None:
    with open_browser() as driver:
        driver.set_window_size(1300, 1000)
        driver.get("about:blank")
        clock = Clock(driver)
        print(f"  {'seconds':<24} {'passed':>8} {'computed':>8}")
        driver.get(page.as_uri())
        while not driver.find_elements("css selector", "[role=option]"):
            time.sleep(0.01)
        clock.say("open, experts listed")
        while driver.execute_script("return document.readyState") != "complete":
            time.sleep(0.01)
        clock.say("open, figures as well")
        for what, (act, done) in STEPS.items():
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
            driver.save_screenshot(str(screenshots / f"experts-{n_experts}.png"))


def main(n_experts: int, screenshots: Path | None = None) -> None:
    with TemporaryDirectory() as folder:
        run = write_run(Path(folder) / "run", experts=made_up(n_experts))
        file = run / "experts.json"
        start = time.perf_counter()
        page = write_report(run)
        beside = sum(path.stat().st_size for path in run.glob("report-*/*")) / 1e6
        print(
            f"{n_experts:,} experts: {file.stat().st_size / 1e6:.0f} MB of experts.json, a page of "
            f"{page.stat().st_size / 1e6:.0f} MB and {beside:.0f} MB beside it, written in "
            f"{time.perf_counter() - start:.1f} s",
            flush=True,
        )
        measure(page, n_experts, screenshots)


if __name__ == "__main__":
    main(int((sys.argv[1:] or ["30000"])[0]), *map(Path, sys.argv[2:3]))
