"""A graph's page in a real browser."""

import pytest
from selenium.webdriver.common.keys import Keys

from ..unit.test_graph_page import NODES, write_graph
from ..unit.test_report import HOSTILE
from .test_report_page import Reader, driver, pytestmark  # noqa: F401


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    return write_graph(tmp_path_factory.mktemp("graph")).as_uri()


@pytest.fixture
def page(driver, address):  # noqa: F811
    reader = Reader(driver)
    reader.width(1200)
    driver.get("about:blank")
    driver.get(address)
    reader.wait(lambda: reader.all(".node"))
    yield reader
    assert reader.console() == []
    assert reader.all("img, iframe") == []
    assert driver.execute_script("return window.pwned === undefined")


def node(page, label):
    return next(n for n in page.all(".node") if label in n.get_attribute("aria-label"))


def listed(page):
    return [button.get_property("textContent") for button in page.all("#detail li button")]


def test_it_opens_with_the_likeliest_target_and_its_edges(page):
    assert len(page.all(".node")) == len(NODES)
    assert page.text("#detail h3") == "“ mat”, predicted"
    assert [button[:5] for button in listed(page)] == ["+1.52", "-1err", "+0.51"]
    assert len(page.all(".edge")) == 3 and len(page.all(".edge.minus")) == 1
    assert "0.5" in page.text("#detail .numbers")


def test_a_click_shows_an_expert(page):
    node(page, "1#2 animals").click()
    assert page.text("#detail h3").startswith("1#2 animals · cats at “")
    assert [text.partition(" ")[0] for text in listed(page)] == ["+1token", "+0.5“", "-0.252#3"]
    tokens = [token.get_property("textContent") for token in page.all("#detail .token")]
    assert tokens == [" kitten+1.2", "↵+0.5", " rock-0.5"]
    assert len(page.all("#detail .context")) == 3
    assert page.driver.current_url.endswith("#1_2_2")
    assert len(page.all('.node[aria-pressed="true"]')) == 1
    page.all("#detail li button")[2].click()
    assert page.text("#detail h3").startswith("2#3 at")
    assert "Not described yet: mxd-lens experts" in page.text("#detail")


def test_keys_move_between_nodes(page):
    page.all('.node[tabindex="0"]')[0].send_keys(Keys.ARROW_DOWN)
    focused = page.driver.switch_to.active_element
    assert focused.get_attribute("aria-label").startswith("2#3")
    focused.send_keys(Keys.ARROW_DOWN)
    page.driver.switch_to.active_element.send_keys(Keys.ARROW_LEFT)
    page.driver.switch_to.active_element.send_keys(Keys.ENTER)
    assert page.text("#detail h3").startswith("1#")
    assert len(page.all('.node[tabindex="0"]')) == 1


def test_search_and_hostile_names(page):
    page.one("#search").send_keys("kitten")
    assert page.text("#status") == f"1 of {len(NODES)} nodes"
    assert len(page.all(".node.missed")) == len(NODES) - 1
    page.one("#search").clear()
    node(page, "1#0").click()
    assert HOSTILE.replace("\u2028", "").strip() in page.text("#detail h3").replace("\u2028", "")


def test_it_fits_narrow_and_dark_screens(page):
    assert page.fits(390)
    page.driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": "dark"}]},
    )
    dark = "return getComputedStyle(document.body).backgroundColor"
    assert page.driver.execute_script(dark) == "rgb(20, 24, 28)"
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_ablations_are_drawn(page):
    page.draw(page.one(".plot"))
    assert "layers in place" in page.text("main")
