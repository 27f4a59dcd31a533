"""The report in a real browser: what a reader does with it, and what a corpus must not."""

import shutil
import time

import pytest
from selenium.common.exceptions import StaleElementReferenceException

from mxd_lens.report.page import write_comparison_page, write_report

from ..helpers import write_comparison, write_run
from ..unit import test_report as made

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver on the PATH"
)


class Reader:
    """A page in Chromium, by CSS selectors."""

    def __init__(self, driver):
        self.driver = driver

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def one(self, selector):
        (element,) = self.all(selector)
        return element

    def text(self, selector):
        return self.one(selector).get_property("textContent")

    def ids(self):
        """The experts that are listed, in order."""
        script = "return [...document.querySelectorAll('[role=option]')].map((row) => row.id)"
        return [int(row.removeprefix("option-")) for row in self.driver.execute_script(script)]

    def choose(self, selector, text):
        """An option of a <select>."""
        options = self.one(selector).find_elements("css selector", "option")
        next(o for o in options if o.get_property("textContent") == text).click()

    def wait(self, condition):
        """Until it holds."""
        end = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < end, "waited for 20 seconds"
            time.sleep(0.05)

    def wait_for_expert(self, i):
        self.wait(lambda: self.all("#detail h3") and self.text("#detail h3").startswith(f"#{i}"))

    def open_expert(self, i):
        self.wait(lambda: self._clicked(f"#option-{i}"))
        self.wait_for_expert(i)

    def _clicked(self, selector):
        try:
            self.one(selector).click()
        except StaleElementReferenceException:  # rows are made anew while the list scrolls
            return False
        return True

    def draw(self, plot):
        self.driver.execute_script("arguments[0].scrollIntoView()", plot)
        self.wait(lambda: plot.find_elements("css selector", ".main-svg"))

    def width(self, width):
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False},
        )

    def fits(self, width):
        """Nothing reaches beyond a screen of this width, but within boxes that scroll."""
        self.width(width)
        return self.driver.execute_script("return document.documentElement.scrollWidth") <= width

    def console(self):
        return [entry["message"] for entry in self.driver.get_log("browser")]


@pytest.fixture(scope="module")
def driver():
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    run = made.write_whole(tmp_path_factory.mktemp("report") / "compare")
    return write_report(run).as_uri()


def opened(driver, address):
    """A page, opened anew, on a wide screen; whatever is done to it, nothing may go wrong."""
    reader = Reader(driver)
    reader.width(1200)
    driver.get("about:blank")
    driver.get(address)
    reader.wait(reader.ids)  # on a busy machine the driver can return before the page is there
    yield reader
    assert reader.console() == []
    assert reader.all("img, iframe") == []
    assert driver.execute_script("return window.pwned === undefined")


@pytest.fixture
def page(driver, address):
    yield from opened(driver, address)


@pytest.fixture
def comparison(driver, tmp_path):
    """The page of a comparison at one k, with experts of whom only contexts are known."""
    results = write_comparison(tmp_path, {}, {"architecture": "topk_transcoder"}, made.CONTROL)
    write_run(tmp_path / "mxd", experts=made.UNDESCRIBED)
    write_comparison_page(results)
    yield from opened(driver, (tmp_path / "results.html").as_uri())


def test_meaningful_experts_come_first(page):
    assert page.ids() == [2, 7, 3, 0, 9]
    assert page.text("#status") == "5 of 5 experts"


@pytest.mark.parametrize(
    "words, found",
    [
        ("#7", [7]),
        ("7", [7]),
        ("CATS", [2]),  # a name
        ("felines", [2]),  # a label
        ("kitten", [2]),  # a promoted token
        ("near beyond", [2]),  # a context
        ("fish", [9]),  # a strongest context; it is a weaker one of the others
        ("</script><img", [2, 3, 0, 7]),
        ("unicorn", []),
    ],
)
def test_search(page, words, found):
    page.one("#search").send_keys(words)
    assert sorted(page.ids()) == sorted(found)
    assert page.text("#status").startswith(f"{len(found)} of 5")


@pytest.mark.parametrize(
    "order, ids",
    [
        ("density: fires most often", [9, 7, 3, 2, 0]),
        ("density: fires least often", [0, 2, 3, 7, 9]),
        ("coherence of contexts", [3, 2, 7, 0, 9]),
        ("writes what it fires on", [2, 7, 0, 3, 9]),
        ("mean activation", [2, 7, 0, 3, 9]),
        ("best probe F1, fewest features first", [2, 7, 3, 0, 9]),
        ("number", [0, 2, 3, 7, 9]),
    ],
)
def test_order(page, order, ids):
    page.choose("#order", order)
    assert page.ids() == ids


def test_experts_of_a_class(page):
    page.choose("#order", "number")
    page.choose("#class", "cats")
    assert page.ids() == [7, 2, 3]
    page.choose("#class", made.HOSTILE)
    assert page.ids() == [0]
    assert page.text("#status") == "1 of 5 experts; 1 of the class fired nowhere here"
    page.choose("#class", "any")
    assert page.ids() == [0, 2, 3, 7, 9]


def test_a_click_shows_the_expert(page):
    page.open_expert(2)
    assert page.driver.current_url.endswith("#expert=2")
    assert page.one("[aria-selected=true]").get_attribute("id") == "option-2"
    marks = [mark.get_property("textContent") for mark in page.all("mark")]
    assert marks == [" cat", " near", "↵"]
    assert page.all("mark")[0].get_attribute("title") == "activation 4"
    first, second, third = (c.get_property("textContent") for c in page.all(".context .text"))
    assert first == f" the cat↵ sat{made.HOSTILE} on" and third == first
    assert second == f"… {' far' * 24} near{' beyond' * 12} …"
    headings = [heading.text for heading in page.all("#detail h4")]
    assert headings[0] == "Strongest contexts"
    assert headings[-1] == "Contexts at the 25% quantile of its activation"
    assert len(page.all("#detail svg rect")) == 20
    tokens = [token.get_property("textContent") for token in page.all(".token")]
    assert tokens == [" kitten+1.2", "↵+0.5", " rock-0.5"]


def test_the_whole_text(page):
    page.open_expert(2)
    page.one(".context button").click()
    whole = page.all(".context .text")[1].get_property("textContent")
    assert whole == f"{' far' * 30} near{' beyond' * 20}"


def test_the_keyboard(page):
    page.one("#search").send_keys("\ue015")  # arrow down: into the list
    experts = page.driver.switch_to.active_element
    assert experts.get_attribute("role") == "listbox"
    experts.send_keys("\ue015\ue015\ue013")  # down, down, up
    assert experts.get_attribute("aria-activedescendant") == "option-7"
    experts.send_keys("\ue007")  # Enter
    page.wait_for_expert(7)
    experts.send_keys("\ue010\ue007")  # End, Enter
    page.wait_for_expert(9)


def test_links(page):
    page.open_expert(2)
    links = page.all("#detail a")
    hrefs = [link.get_attribute("href").split("#")[1] for link in links]
    assert hrefs == ["expert=2", "expert=7", "expert=0"]  # its own, to be copied
    links[1].click()
    page.wait_for_expert(7)
    page.driver.back()
    page.wait_for_expert(2)
    page.driver.forward()
    page.wait_for_expert(7)
    assert page.one("[aria-selected=true]").get_attribute("id") == "option-7"


def test_the_classes_of_an_expert(page):
    page.open_expert(7)
    assert "rank 1; F1 0.5 by itself" in page.text("#detail")
    page.one("#detail li button").click()
    assert page.ids() == [7, 2, 3]


def test_a_link_opens_an_expert(page, address):
    page.driver.get("about:blank")
    page.driver.get(f"{address}#expert=0")
    page.wait_for_expert(0)
    assert page.text("#detail h3") == f"#0{made.HOSTILE}"
    assert page.text(".sample").startswith("steered")
    assert page.one("#option-0").get_attribute("aria-selected") == "true"
    page.driver.get(f"{address}#expert-11")
    page.wait(lambda: "Expert 11 fired nowhere" in page.text("#detail"))


def test_links_of_earlier_pages(page, address):
    page.driver.get("about:blank")
    page.driver.get(f"{address}#expert-9")
    page.wait_for_expert(9)


@pytest.mark.parametrize(
    "asked, found",
    [
        ({"least-coherence": "0.2"}, [2, 3]),
        ({"least-coherence": "0.2", "most-coherence": "0.3"}, [2]),
        ({"most-density": "0.4"}, [0, 2, 3]),  # in percent
        ({"most-agreement": "0.9"}, [7]),
        ({"least-f1": "0.5", "least-mean": "3"}, [2]),
        ({"least-same_token": "50"}, [0, 2, 3, 7, 9]),
        ({"most-same_token": "49"}, []),
    ],
)
def test_filters(page, asked, found):
    page.one("#filters summary").click()
    for name, value in asked.items():
        page.one(f"#{name}").send_keys(value)
    assert sorted(page.ids()) == found
    assert page.text("#status").startswith(f"{len(found)} of 5")
    page.one("#filters button").click()
    page.wait(lambda: len(page.ids()) == 5)
    page.one("#meaningful").click()
    assert page.ids() == [2, 7]
    assert page.fits(400) and page.fits(1200)


def test_every_figure_is_drawn(page):
    plots = page.all(".plot")
    assert len(plots) == 6
    for plot in plots:
        page.draw(plot)
        assert plot.rect["width"] <= 1200


def test_the_sample_of_a_steered_expert(page):
    plot = page.all(".plot")[-1]
    page.draw(plot)
    page.driver.execute_script(
        "Plotly.Fx.hover(arguments[0], [{curveNumber: 0, pointNumber: 0}])", plot
    )
    label = plot.find_element("css selector", ".hoverlayer").get_property("textContent")
    assert "expert 2, strength 1" in label and "</script><img src=x" in label


def test_a_narrow_screen(page):
    assert page.fits(400)
    page.one("#search").send_keys("dogs")
    page.open_expert(7)
    top = "return arguments[0].getBoundingClientRect().top"
    detail = page.one("#detail")
    page.wait(lambda: 0 <= page.driver.execute_script(top, detail) < 200)
    assert detail.rect["y"] > page.one("#scroll").rect["y"] + page.one("#scroll").rect["height"]
    page.one("#back").click()
    assert page.driver.switch_to.active_element.get_attribute("id") == "list"
    assert page.driver.execute_script(top, page.one("#list")) > 0
    assert page.fits(400)


@pytest.fixture
def two(driver, tmp_path):
    """A page that has another layer's experts beside its own."""
    yield from opened(driver, write_report(made.write_pair(tmp_path / "pair")).as_uri())


def left(page):
    return page.all("#detail section")[0]


def right(page):
    return page.all("#detail section")[1]


def texts(page, selector):
    """Of all of these at one time: they are made anew when another expert is opened."""
    script = "return [...document.querySelectorAll(arguments[0])].map((node) => node.textContent)"
    return page.driver.execute_script(script, selector)


def titles(page):
    """Of the experts that are open."""
    return texts(page, "#detail h3")


def wait_for_both(page, own, other):
    def both():
        found = titles(page)
        return len(found) == 2 and found[0].startswith(own) and found[1].startswith(other)

    page.wait(both)


def test_the_nearest_expert_of_another_layer_is_beside(two):
    two.one("#option-2").click()
    wait_for_both(two, "#2animals", "#4pets")
    assert "felines, too · detection F1 0.75" in titles(two)[1]
    assert right(two).get_attribute("aria-label") == f"layer 0: {made.HOSTILE}"
    assert texts(two, ".near li") == ["#4 pets 0.75", "#8 on “own” 0.13", "#11 0.063"]
    assert two.one(".near [aria-current]").get_property("textContent") == "#4 pets"
    assert texts(two, ".pair > section + section .text") == [f" the cat↵ sat{made.HOSTILE} on"]
    assert left(two).rect["y"] == right(two).rect["y"]
    assert left(two).rect["x"] + left(two).rect["width"] <= right(two).rect["x"]
    assert abs(left(two).rect["width"] - right(two).rect["width"]) < 40
    two.one("#option-7").click()
    nothing = "None of its experts fires where this one does."
    two.wait(lambda: texts(two, ".near p") == [nothing])


def test_going_through_the_other_layers_experts(two):
    """By the keyboard: a link, the one it leads to, and back."""
    two.one("#option-2").click()
    wait_for_both(two, "#2", "#4")
    two.all(".near a")[1].send_keys("\ue007")  # Enter
    wait_for_both(two, "#2", "#8")
    assert two.driver.current_url.endswith("#expert=2&beside=8")
    assert two.driver.switch_to.active_element == two.all("#detail h3")[1]
    assert two.one(".near [aria-current]").get_property("textContent").startswith("#8")
    two.driver.back()
    wait_for_both(two, "#2", "#4")
    by_weights = right(two).find_elements("css selector", ".columns a")
    assert [link.get_attribute("href").split("#")[1] for link in by_weights] == [
        "expert=2&beside=8"
    ]
    by_weights[0].click()
    wait_for_both(two, "#2", "#8")
    left(two).find_elements("css selector", ".columns a")[0].click()  # of its own layer
    two.wait(lambda: titles(two)[0].startswith("#7"))
    assert two.driver.current_url.endswith("#expert=7")
    assert two.one("[aria-selected=true]").get_attribute("id") == "option-7"


def test_links_to_an_expert_and_one_beside_it(two):
    address = two.driver.current_url
    for where, own, other in [
        ("#expert=2", "#2", "#4"),
        ("#expert=0&beside=8", "#0", "#8"),
        ("#expert=0", "#0", "#1"),
    ]:
        two.driver.get("about:blank")
        two.driver.get(f"{address}{where}")
        wait_for_both(two, own, other)
    assert right(two).find_element("css selector", ".sample").text.startswith("</script>")
    two.driver.get(f"{address}#expert=2&beside=11")
    nowhere = "Expert 11 fired nowhere in these texts."
    two.wait(lambda: texts(two, "#detail section > p:last-child") == [nowhere])
    two.driver.get(f"{address}#expert=11")
    two.wait(lambda: texts(two, "#detail") == [nowhere])


@pytest.fixture
def two_large(driver, tmp_path, monkeypatch):
    """The same, with what is known of the experts beside the page."""
    monkeypatch.setattr("mxd_lens.report.experts.INLINE", 0)
    page = write_report(made.write_pair(tmp_path / "pair"))
    assert len([*page.parent.glob("report-experts-*")]) == 2
    yield from opened(driver, page.as_uri())


def test_shards_of_two_layers(two_large):
    two_large.one("#option-2").click()
    wait_for_both(two_large, "#2", "#4")
    two_large.one("#option-0").click()
    wait_for_both(two_large, "#0", "#1")
    assert texts(two_large, ".pair > section + section .sample") == [made.HOSTILE]


def test_two_layers_on_a_narrow_screen(two):
    assert two.fits(400)
    two.one("#option-2").click()
    wait_for_both(two, "#2", "#4")
    assert two.fits(400) and two.fits(800)
    assert right(two).rect["y"] >= left(two).rect["y"] + left(two).rect["height"]
    two.one("#across").click()
    top = "return arguments[0].getBoundingClientRect().top"
    two.wait(lambda: 0 <= two.driver.execute_script(top, right(two)) < 100)
    assert two.driver.switch_to.active_element == two.all(".near a")[0]
    two.all(".near a")[1].click()
    wait_for_both(two, "#2", "#8")
    two.wait(lambda: 0 <= two.driver.execute_script(top, right(two)) < 400)
    assert two.fits(1200) and not two.one("#across").is_displayed()


@pytest.fixture
def many(driver, tmp_path, monkeypatch):
    """3,000 experts, with what is known of them beside the page."""
    monkeypatch.setattr("mxd_lens.report.experts.INLINE", 0)
    experts = [
        made.expert(i, name=f"{'cats' if i % 1000 == 0 else 'dogs'} {i}", sample=made.HOSTILE)
        for i in range(0, 6000, 2)
    ]
    run = write_run(tmp_path / "run", experts=made.EXPERTS | {"experts": experts})
    yield from opened(driver, write_report(run).as_uri())


def test_many_experts(many):
    many.choose("#order", "number")
    assert many.ids()[:3] == [0, 2, 4] and len(many.ids()) < 40
    many.one("#list").send_keys("\ue010\ue007")  # End, Enter
    many.wait_for_expert(5998)
    assert many.text(".sample") == made.HOSTILE and len(many.all(".context")) == 2
    assert many.ids()[-1] == 5998 and len(many.ids()) < 40
    many.driver.execute_script("document.getElementById('scroll').scrollTop /= 2")
    many.wait(lambda: 2500 < many.ids()[0] < 3500)
    many.open_expert(many.ids()[10])
    many.one("#search").send_keys("cats")
    assert many.ids() == [0, 1000, 2000, 3000, 4000, 5000]
    many.driver.execute_script("location.hash = '#expert=4000'")
    many.wait_for_expert(4000)
    assert many.one("[aria-selected=true]").get_attribute("id") == "option-4000"


def test_shards_that_are_not_there(many, tmp_path):
    (folder,) = (tmp_path / "run").glob("report-experts-*")
    aside = folder.rename(tmp_path / "aside")
    many.all("[role=option]")[0].click()
    many.wait(lambda: "beside this page" in many.text("#detail"))
    assert "ERR_FILE_NOT_FOUND" in many.console()[0]
    aside.rename(folder)
    many.all("[role=option]")[0].click()
    many.wait(lambda: many.all("#detail h3"))


def test_dark_mode(page):
    def colour(selector, name):
        found = "const node = document.querySelector(arguments[0]); "
        script = f"{found} return node && getComputedStyle(node).getPropertyValue(arguments[1])"
        return page.driver.execute_script(script, selector, name)

    def colours():
        return colour("body", "color"), colour(".plot .xtitle", "fill")

    def choose(scheme):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    page.draw(page.all(".plot")[0])
    light, dark = "rgb(28, 33, 38)", "rgb(227, 231, 235)"
    for scheme, expected in {"light": light, "dark": dark, "": light}.items():
        choose(scheme)
        page.wait(lambda expected=expected: colours() == (expected, expected))


def test_a_comparison_with_the_contexts_of_experts(comparison):
    for plot in comparison.all(".plot"):
        comparison.draw(plot)
    bars = [bar.get_property("textContent") for bar in comparison.all(".bartext")]
    assert bars == ["+0.0625", "+0.0625", "+0.1250", "+0.1875", "+0.1875"]
    comparison.open_expert(1)
    assert len(comparison.all(".context")) == 2 and not comparison.all(".token, .sample")
    assert "agreement" not in comparison.text("#browser") + comparison.text("#order")
    assert not comparison.one("#class").is_displayed()
    assert comparison.fits(1300) and comparison.fits(400)
