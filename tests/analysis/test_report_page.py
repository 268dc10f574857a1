"""The report in a real browser: opened from a file, without a network, with hostile texts in it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from made_run import answers, drift_found, episode, write_run

from nanomath.analysis.report import report
from nanomath.analysis.runs import read_run

webdriver = pytest.importorskip("selenium.webdriver")
pytest.importorskip("plotly")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver"
)

HOSTILE = [
    "</script><script>window.hacked = 1</script>",
    "<!-- <script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    '[a](javascript:window.hacked=1) <a href="javascript:window.hacked=1">b</a>',
    "{{ 7 * 7 }} {% for x in y %} ${window.hacked = 1} `+alert(1)+`",
    "line\u2028separator\u2029 nul\x00 bell\x07 ",
    "\u202eright to left\u202c \u2066isolate",
    "half \ud83d a pair \ude00",
    "e\u0301" * 40 + "\u200b\ufeff",
]


class Browser:
    """A page in chromium; `requests` is what it asked the network for."""

    def __init__(self) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
            options.add_argument(word)
        options.set_capability(
            "goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"}
        )
        service = webdriver.ChromeService(DRIVER)
        self.driver = webdriver.Chrome(options=options, service=service)
        self.size(1400)

    def size(self, width: int, dark: bool = False) -> None:
        command = self.driver.execute_cdp_cmd
        shape = {
            "width": width,
            "height": 1000,
            "deviceScaleFactor": 1,
            "mobile": False,
        }
        command("Emulation.setDeviceMetricsOverride", shape)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        command("Emulation.setEmulatedMedia", {"features": [scheme]})

    def open(self, path: Path, place: str = "") -> None:
        self.driver.get("about:blank")
        self.driver.get_log("performance")
        self.driver.get(f"file://{path}{place}")
        self.wait("return document.documentElement.dataset.ready")

    def run(self, script: str, *arguments: object) -> object:
        return self.driver.execute_script(script, *arguments)

    def wait(self, script: str) -> object:
        """The first value of the script that is true, within 20 seconds."""
        end = time.monotonic() + 20
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.02)
        return value

    def text(self, selector: str) -> str:
        return self.run(
            "return document.querySelector(arguments[0]).innerText.toWellFormed()",
            selector,
        )

    def count(self, selector: str) -> int:
        return self.run(
            "return document.querySelectorAll(arguments[0]).length", selector
        )

    def press(self, keys: str) -> None:
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).send_keys(keys).perform()

    def requests(self) -> list[str]:
        """Addresses that were asked for, but for the page itself."""
        messages = [
            json.loads(e["message"])["message"]
            for e in self.driver.get_log("performance")
        ]
        return [
            m["params"]["request"]["url"]
            for m in messages
            if m["method"] == "Network.requestWillBeSent"
            and not m["params"]["request"]["url"].startswith(
                ("file://", "data:", "blob:")
            )
        ]

    def complaints(self) -> list[str]:
        return [
            e["message"]
            for e in self.driver.get_log("browser")
            if e["level"] == "SEVERE"
        ]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    browser = Browser()
    yield browser
    browser.driver.quit()


@pytest.fixture(scope="module")
def write(tmp_path_factory) -> Callable[..., Path]:
    """write(**files): the report of a made run."""

    def write(**files) -> Path:
        directory = tmp_path_factory.mktemp("runs")
        run = read_run(write_run(directory / "run", **files))
        path = directory / "report.html"
        path.write_text(report([run]), "utf-8")
        return path

    return write


@pytest.fixture(scope="module")
def page(write) -> Path:
    """A run of 30 steps with two problems of four samples in every third."""
    metrics = [
        {"step": n, "reward": 0.3 + n / 100, "pass@1": 0.3 + n / 100, "kl": n / 500}
        | {"update_ratio/layers.0": 0.001, "update_ratio/norm": 0.002}
        for n in range(1, 31)
    ]
    for step, value in ((0, 0.3), (30, 0.6)):
        around = {"heldout/pass@1_low": value - 0.1, "heldout/pass@1_high": value + 0.1}
        metrics.insert(step, {"step": step, "heldout/pass@1": value, **around})
    rows = [
        episode(
            step,
            p,
            k,
            step_ends=[2, 5],
            step_scores=[0.9, 0.1],
            step_rewards=[0.5, -0.5],
        )
        for step in range(1, 31, 3)
        for p in (0, 1)
        for k in range(4)
    ]
    rows[6]["text"] = "unheard of"
    rows[7] |= {"found": None, "finish_reason": "length"}
    groups = [
        {"step": n, "problems": ["p0", "p1"], "right": [2, 4], "samples": 4}
        for n in range(1, 31)
    ]
    heldout = answers(0, [True, False] * 4) + answers(30, [True] * 8)
    return write(metrics=metrics, rollouts=rows, groups=groups, heldout=heldout)


def test_it_opens_without_a_network(browser, page):
    browser.open(page)
    assert browser.requests() == [] and browser.complaints() == []
    assert "it learned" in browser.text(".findings")
    browser.wait("return document.querySelectorAll('.js-plotly-plot').length >= 2")
    assert browser.count("#kinds tr") == 3


@pytest.mark.slow
def test_a_curve_is_zoomed_and_all_follow(browser, page):
    browser.open(page, "#curves")
    names = "return window.page.curves.charts.filter(c => c.drawn && c.name).map(c => c.name)"
    browser.wait(f"{names.replace('return ', 'return (')}).length >= 2")
    plots = "window.page.curves.charts.filter(c => c.drawn && c.name && c.visible)"
    browser.run(
        f"Plotly.relayout({plots}[0].plot, {{'xaxis.range[0]': 5, 'xaxis.range[1]': 9}})"
    )
    ranges = browser.wait(
        f"const r = {plots}.map(c => c.plot.layout.xaxis.range); return r[1] && r"
    )
    assert all(range_ == [5, 9] for range_ in ranges)
    browser.run("document.getElementById('whole').click()")
    browser.wait(f"return {plots}.every(c => c.plot.layout.xaxis.range[0] < 2)")


@pytest.mark.slow
def test_smoothing_a_log_axis_and_one_cursor(browser, page):
    browser.open(page, "#curves")
    browser.wait(
        "return window.page.curves.charts.some(c => c.drawn && c.name == 'pass@1')"
    )
    browser.run(
        "const s = document.getElementById('smooth'); s.value = 11;"
        "s.dispatchEvent(new Event('input')); document.getElementById('logarithmic').click()"
    )
    chart = "window.page.curves.charts.find(c => c.name == 'pass@1')"
    assert browser.run(f"return {chart}.plot.layout.yaxis.type") == "log"
    smooth = browser.run(f"return Array.from({chart}.plot.data.at(-1).y)")
    assert smooth[15] == pytest.approx(0.3 + 16 / 100) and smooth[0] == pytest.approx(
        0.3 + 3.5 / 100
    )
    browser.run("window.page.curves.point(12)")
    shown = browser.run(
        "return window.page.curves.charts.filter(c => c.drawn)"
        ".map(c => getComputedStyle(c.cursor).display)"
    )
    assert len(shown) > 1 and set(shown) == {"block"}
    assert "step 12: 0.42" in browser.run(f"return {chart}.value.textContent")


def test_a_name_explains_itself(browser, page):
    browser.open(page)
    title = "return document.querySelector('[data-metric=kl] .name').title"
    assert "mean of the k3 estimate" in browser.run(title)


def test_links_and_keys_walk_to_a_rollout(browser, page):
    browser.open(page, "#run=0&step=4&problem=1&sample=3")
    assert browser.text(".place output") == "4"
    assert "#3" in browser.text(".sample.chosen")
    top = "return document.getElementById('rollouts').getBoundingClientRect().top"
    assert abs(browser.run(top)) < 200
    arrows = {"left": "\ue012", "up": "\ue013", "right": "\ue014", "down": "\ue015"}
    browser.press(arrows["right"])
    assert browser.text(".place output") == "7"
    browser.press(arrows["down"])
    assert browser.run("return location.hash") == "#run=0&step=7&problem=1"
    browser.press(arrows["left"] + arrows["left"] + arrows["left"])
    assert browser.text(".place output") == "1"
    browser.run("location.hash = '#step=29'")
    browser.wait(
        "return document.querySelector('.place output').innerText.startsWith('28')"
    )
    assert "29 is not logged" in browser.text(".place output")


def test_samples_are_sorted_and_alike_ones_are_together(browser, page):
    browser.open(page, "#step=1&problem=0")
    assert browser.count(".sample") == 2
    assert browser.text(".sample.right b") == "#0 #2"
    assert "step 0 · score 0.90 · paid 0.50" in browser.text(".sample .step")
    shared = browser.run(
        "return document.querySelectorAll('.sample.right .t.shared').length"
    )
    assert 0 < shared < browser.count(".sample.right .t")


@pytest.mark.slow
def test_another_value_colours_the_tokens(browser, page):
    colour = "return document.querySelector('.sample .t').style.backgroundColor"
    browser.open(page, "#step=1&problem=0")
    first = browser.run(colour)
    browser.press("3")
    assert (
        browser.run("return document.querySelector('[aria-pressed=true]').innerText")
        == "entropy"
    )
    assert browser.run(colour) != first != ""
    browser.run(
        "document.querySelector('.sample .t').dispatchEvent("
        "new MouseEvent('mouseover', {bubbles: true}))"
    )
    tip = browser.text("#tip")
    for words in (
        "entropy\t0.750",
        "probability\t77.9%",
        "KL to reference\t0.250",
        "step credit\t0.500",
    ):
        assert words in tip


@pytest.mark.parametrize(
    ("kind", "number"),
    [("right", 40), ("wrong", 40), ("truncated", 1), ("no answer", 1)],
)
def test_filters(browser, page, kind, number):
    browser.open(page)
    browser.run(
        "const s = document.querySelector('[aria-label=\"which samples\"]');"
        "s.value = arguments[0];"
        "s.dispatchEvent(new Event('change'))",
        kind,
    )
    assert browser.text(".found").startswith(f"{number} of 80 samples")


def test_search_finds_text_and_goes_there(browser, page):
    browser.open(page, "#step=28")
    browser.press("/")
    browser.press("unheard")
    assert browser.text(".found").startswith("1 of 80 samples")
    browser.run("document.activeElement.blur()")
    browser.press("n")
    assert browser.run("return location.hash") == "#run=0&step=1&problem=1&sample=2"


@pytest.mark.parametrize("with_tokens", [True, False])
def test_hostile_texts_are_only_texts(browser, write, with_tokens):
    rows = [
        episode(1, p, 0, text=text, question=text, answer=text)
        for p, text in enumerate(HOSTILE)
    ]
    for row in rows:
        row |= {"found": row["text"], "problem": row["text"]}
        row |= {"hint": row["text"], "level": 0.5}
        if not with_tokens:
            row |= {
                "prompt_tokens": [10**6],
                "tokens": [10**6] * 3,
                "advantages": [0.0] * 3,
            }
            row |= {name: [-0.5] * 3 for name in ("logprobs", "entropy")}
    clean = [text.encode("utf-8", "replace").decode("utf-8") for text in HOSTILE]
    heldout = [
        {
            **record,
            "question": text,
            "gold": text,
            "answer": text,
            "text": text,
            "problem": text,
        }
        for step in (0, 1)
        for record, text in zip(answers(step, [step == 1] * 9), clean, strict=True)
    ]
    config = {"model.path": HOSTILE[0]}
    path = write(
        metrics=[{"step": 1, "kl": 0.1}], rollouts=rows, heldout=heldout, config=config
    )
    browser.open(path)
    for problem, text in enumerate(HOSTILE):
        browser.run("location.hash = arguments[0]", f"#step=1&problem={problem}")
        browser.wait(f"return window.page.viewer.place.problem === {problem}")
        assert browser.run("return window.hacked === undefined")
        assert browser.count("img") == 0 and browser.count(".sample a") == 0
        shown = browser.text(".question")
        assert "hint, level 0.5:" in shown
        if text.isprintable():
            assert shown.count(text) == 3  # question, answer, hint
    assert browser.requests() == [] and browser.complaints() == []
    browser.open(path, "#step=1&problem=6")
    assert "U+202E" in browser.text(".question")


def test_what_a_person_should_see(browser, write):
    """The least sure first; whatever a model proposed, or a file claims, is only text."""
    rows = [
        {
            "id": text,
            "question": text,
            "answer": text,
            "confidence": {"majority": sure, text: None},
            "measure": "majority",
            "threshold": 0.75,
            "reason": text,
        }
        for text, sure in zip(HOSTILE, (0.5, 0.25, *[0.6] * 7), strict=True)
    ]
    rows.append({**rows[0], "answer": None, "confidence": {"majority": None}})
    rows.append({"confidence": "not a table"})
    rows.append({"confidence": {"majority": "high"}, "measure": "majority"})
    rows.append(
        {**rows[0], "confidence": {"majority": "high"}, "measure": ["majority"]}
    )
    clean = json.loads(json.dumps(rows).replace("\\ud83d", "?").replace("\\ude00", "?"))
    browser.open(write(metrics=[{"step": 1, "kl": 0.1}], handoff=clean))
    assert browser.run("return window.hacked === undefined")
    assert browser.requests() == [] and browser.complaints() == []
    assert browser.count("#handoff .flip") == 10
    assert browser.count("#handoff img") == browser.count("#handoff a") == 0
    assert "10 answers of which the model is not sure enough" in browser.text(
        "#handoff"
    )
    assert "no answer" in browser.text("#handoff .flip:nth-of-type(1)")
    assert "majority 0.25" in browser.text("#handoff .flip:nth-of-type(2)")
    browser.open(write(metrics=[{"step": 1, "kl": 0.1}]))
    assert browser.count("#handoff") == browser.count("[href='#handoff']") == 0


@pytest.mark.slow
def test_a_huge_completion_is_shown_in_part(browser, write):
    row = episode(1, 0, 0, text="9" * 100_000)
    path = write(metrics=[{"step": 1, "kl": 0.1}], rollouts=[row])
    browser.open(path, "#step=1")
    shown = browser.count(".sample .t")
    assert shown <= 3000
    browser.run("document.querySelector('.strip button').click()")
    assert browser.count(".sample .t") == len(row["tokens"]) > 3000


@pytest.mark.slow
def test_two_thousand_episodes_open(browser, write):
    rows = [episode(1 + n // 16, n // 8 % 2, n % 8) for n in range(2000)]
    for row in rows:
        row["tokens"] = (row["tokens"] * 12)[:200]
        for name in ("advantages", "logprobs", "entropy"):
            row[name] = (row[name] * 12)[:200]
    path = write(metrics=[{"step": 1, "kl": 0.1}], rollouts=rows)
    browser.open(path, "#step=100")
    assert browser.text(".place output") == "100"


@pytest.mark.slow
def test_ten_thousand_steps(browser, write):
    metrics = [{"step": n, "reward": n / 1e4, "kl": 0.1} for n in range(1, 10_001)]
    rows = [episode(n, 0, k) for n in range(1, 10_001) for k in (0, 1)]
    path = write(metrics=metrics, rollouts=rows)
    assert path.stat().st_size < 6e6
    browser.open(path, "#step=10000")
    assert browser.text(".place output") == "10000"


def test_several_runs(browser, tmp_path):
    metrics = [{"step": n, "reward": n / 10} for n in range(1, 9)]
    runs = []
    for beta in (0.0, 0.1):
        for seed in range(3):
            config = {"algorithm.kl_coef": beta, "run.seed": seed}
            right = [n % 4 > seed + 20 * beta for n in range(12)]
            made = write_run(
                tmp_path / f"r{beta}-{seed}",
                config=config,
                metrics=[
                    {**m, "reward": m["reward"] * (1 + seed + beta)} for m in metrics
                ],
                rollouts=[episode(1)],
                heldout=answers(8, right),
            )
            runs.append(read_run(made))
    path = tmp_path / "six.html"
    path.write_text(report(runs), "utf-8")
    browser.open(path, "#curves")
    legend = browser.text(".legend")
    assert "kl_coef=0.1 (n = 3)" in legend and "band: its 95% t interval" in legend
    assert "McNemar's exact p" in browser.text("#compared")
    chart = "window.page.curves.charts.find(c => c.name == 'reward')"
    browser.wait(f"return {chart}.drawn")
    # Band, three seeds, mean; at the last step the seeds are 0.8, 1.6 and 2.4.
    assert browser.run(f"return {chart}.plot.data.length") == 2 * 5
    widths = browser.run(f"return {chart}.plot.data.slice(0, 5).map(t => t.line.width)")
    assert widths == [0, 0.7, 0.7, 0.7, 2.5]
    band = browser.run(f"return Array.from({chart}.plot.data[0].y).slice(7, 9)")
    half = 4.302653 * 0.8 / 3**0.5  # t for two degrees of freedom
    assert band == pytest.approx([1.6 + half, 1.6 - half])
    browser.run("document.getElementById('difference').click()")
    last = browser.run(f"return Array.from({chart}.plot.data.at(-1).y)")
    assert last == pytest.approx([0.1 * m["reward"] for m in metrics])


@pytest.mark.slow
def test_two_seeds_have_no_band(browser, tmp_path):
    metrics = [{"step": n, "reward": n / 10} for n in range(1, 9)]
    configs = [{"run.seed": seed} for seed in (0, 1)]
    runs = [
        read_run(write_run(tmp_path / f"r{n}", config=config, metrics=metrics))
        for n, config in enumerate(configs)
    ]
    path = tmp_path / "two.html"
    path.write_text(report([], {"both": runs}), "utf-8")
    browser.open(path, "#curves")
    assert "both (n = 2)" in browser.text(".legend")
    assert "band" not in browser.text(".legend")
    chart = "window.page.curves.charts.find(c => c.name == 'reward')"
    browser.wait(f"return {chart}.drawn")
    assert browser.run(f"return {chart}.plot.data.length") == 3  # two seeds, mean


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1400, 420])
def test_it_fits_every_width(browser, page, width, dark):
    browser.size(width, dark)
    browser.open(page)
    browser.wait("return document.querySelectorAll('.js-plotly-plot').length >= 1")
    assert browser.run("return document.documentElement.scrollWidth") <= width
    paper = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(20, 23, 26)" if dark else "rgb(255, 255, 255)")
    browser.size(1400)


@pytest.mark.slow
@pytest.mark.parametrize(
    "files",
    [{}, {"metrics": [{"step": 0, "heldout/pass@1": 0.5}]}, {"rollouts": [episode()]}],
)
def test_a_run_that_has_hardly_begun(browser, write, files):
    browser.open(write(**files))
    assert browser.complaints() == []


def test_a_drift_in_the_page(browser, tmp_path):
    directory = write_run(tmp_path / "run")
    found = drift_found(HOSTILE[0], HOSTILE[2])
    (directory / "drift.json").write_text(json.dumps(found), "utf-8")
    path = tmp_path / "report.html"
    path.write_text(report([read_run(directory)]), "utf-8")
    browser.open(path, "#drift")
    assert browser.complaints() == [] and browser.run("return window.hacked") is None
    shown = browser.text("#drift")
    assert HOSTILE[0].replace(" ", "␣") in shown and HOSTILE[2] in shown
    bars = "return [...document.querySelectorAll('#drift rect')].map(r => r.width.baseVal.value)"
    assert browser.run(bars) == [100, 100, 100, 100]
    browser.size(500)
    wide = "return document.documentElement.scrollWidth <= innerWidth"
    assert browser.run(wide)
    browser.size(1400)
