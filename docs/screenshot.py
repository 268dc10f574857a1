"""The picture of the README: a rollout of a run in its report.

    python docs/screenshot.py runs/tiny-grpo "#step=4&problem=0" 3 docs/results/report.png

Arguments: the run, a place in its report, the number of the value that colours the tokens, and the
picture to write. It needs chromium with its driver, and selenium.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

from nanomath.analysis.report import report
from nanomath.analysis.runs import read_run

WIDTH = 1200
HEIGHT = 760


def main(run: str, place: str, value: str, out: str) -> None:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for word in ("--headless=new", "--no-sandbox", "--hide-scrollbars"):
        options.add_argument(word)
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    with tempfile.TemporaryDirectory() as directory:
        page = Path(directory) / "report.html"
        page.write_text(report([read_run(run)]), "utf-8")
        with webdriver.Chrome(options=options, service=service) as driver:
            shape = {
                "width": WIDTH,
                "height": HEIGHT,
                "deviceScaleFactor": 1,
                "mobile": False,
            }
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", shape)
            driver.get(f"file://{page}{place}")
            ready = "return document.documentElement.dataset.ready"
            WebDriverWait(driver, 60).until(lambda d: d.execute_script(ready))
            driver.execute_script(
                "document.querySelectorAll('.values button')[arguments[0] - 1].click();"
                "document.getElementById('rollouts').scrollIntoView()",
                int(value),
            )
            driver.save_screenshot(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
