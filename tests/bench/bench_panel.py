"""How fast the live panel answers, on the demo model: `python tests/bench/bench_panel.py`.

Prints the median over all layers of the time from a click to the first new figure and to the accuracy on 2,000 tokens,
the time until a panel is open, and how fast the map of a model of 1,000 layers answers: in the kernel, and in Chromium
where playwright is installed. Each layer is set and taken back once, in the order of the model.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path

import torch
from torch import nn

import qnb
from qnb.notebook import panel as rooms

MAP = Path(rooms.__file__).parent / "map.js"

PAGE = """<!doctype html><body><div id="here"></div><script type="module">
const source = SOURCE, state = STATE, heard = {};
const model = {
  get: (name) => state[name],
  set: (name, value) => { state[name] = value; },
  on: (event, call) => { heard[event] = call; },
  save_changes: () => {},
};
const view = await import(URL.createObjectURL(new Blob([source], { type: "text/javascript" })));
view.default.render({ model, el: document.getElementById("here") });
window.answer = (cell) => new Promise((done) => {
  const target = document.querySelectorAll(".qnb-cell")[cell], began = performance.now();
  const { x, y } = target.getBoundingClientRect();
  target.dispatchEvent(new PointerEvent("pointerdown", { bubbles: true, button: 0, clientX: x, clientY: y }));
  window.dispatchEvent(new PointerEvent("pointerup", { bubbles: true }));
  // Two frames: the first may have been under way already.
  requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now() - began)));
});
window.repaint = () => new Promise((done) => {
  const began = performance.now();
  state.faces = state.faces.map((face) => ["w8a8", "#0072b2", "#ffffff", face[3]]);
  heard["change:faces"]();
  requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now() - began)));
});
window.ready = true;
</script></body>"""


class Watch:
    """Notes when the panel first shows the memory, and when the accuracy of all texts, of a new step."""

    def __init__(self, session) -> None:
        self.session, self.first, self.accurate = session, None, None
        session.board.listen(self)

    def show(self) -> None:
        now, step = time.perf_counter(), self.session.present
        if step.number != self.before and self.first is None:
            self.first = now
        done = step.progress is not None and step.progress.texts == len(self.session.stages.evaluation.samples)
        if step.number != self.before and done and self.accurate is None:
            self.accurate = now

    def reset(self) -> None:
        self.first = self.accurate = None
        self.before = self.session.present.number


def layers(scheme: str, most: int | None) -> None:
    model, _ = qnb.demo_lm()
    began = time.perf_counter()
    panel = qnb.panel(model)
    opened = time.perf_counter() - began
    panel.settle()
    session = panel.session
    watch = Watch(session)
    names = session.globbed[:: max(1, len(session.globbed) // most)] if most else session.globbed
    first, accurate = [], []
    for name in names:
        watch.reset()
        began = time.perf_counter()
        panel.selected = [name]
        panel._scheme.value = scheme
        while watch.accurate is None:
            time.sleep(0.001)
        first.append(watch.first - began)
        accurate.append(watch.accurate - began)
        panel.undo()  # stops what is still measured of this step
        while session.present is not session.original or session.changing:
            time.sleep(0.001)
    tokens = session.original.progress.accuracy.tokens
    blocks = session.stages.evaluation.decoder.why_whole or "blocks before the first changed one are reused"
    print(f"panel open                               {1000 * opened:8.0f} ms   (target 1,000)")
    print(f"click to first new figure                {1000 * statistics.median(first):8.0f} ms   (target 100)")
    label = f"click to accuracy on {tokens:,} tokens"
    print(f"{label:<40} {1000 * statistics.median(accurate):8.0f} ms   (target 600)")
    print(f"  median over {len(names)} layers set to {scheme}; {blocks}; {torch.get_num_threads()} threads")
    panel.session.close()
    panel.close()


def large_map() -> None:
    model = nn.Sequential(*[nn.Sequential(*[nn.Linear(8, 8) for _ in range(8)]) for _ in range(125)]).eval()
    panel = qnb.panel(model, None, [torch.randn(4, 8)])
    panel.session.settle()
    times = []
    for number in range(0, 1000, 50):
        began = time.perf_counter()
        panel.map.selected = [number]
        times.append(time.perf_counter() - began)
    panel.session.settle()
    print(f"map of 1,000 layers, click, kernel       {1000 * statistics.median(times):8.0f} ms   (target 100)")
    state = {name: getattr(panel.map, name) for name in ("places", "faces", "selected", "record")}
    browser(state)
    panel.session.close()
    panel.close()


def browser(state: dict) -> None:
    chromium = shutil.which("chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        chromium = None
    if chromium is None:
        print("map of 1,000 layers, click, browser   unavailable: needs playwright and chromium")
        return
    source = json.dumps(MAP.read_text("utf-8")).replace("</", "<\\/")
    content = PAGE.replace("SOURCE", source, 1).replace("STATE", json.dumps(state).replace("</", "<\\/"), 1)
    with sync_playwright() as playwright:
        window = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = window.new_page()
        page.set_content(content)
        page.wait_for_function("window.ready")
        clicks = [page.evaluate("n => window.answer(n)", n) for n in range(0, 1000, 50)]
        paints = [page.evaluate("() => window.repaint()") for _ in range(5)]
        window.close()
    print(f"map of 1,000 layers, click, browser      {statistics.median(clicks):8.0f} ms   (target 100)")
    print(f"map of 1,000 layers, repaint, browser    {statistics.median(paints):8.0f} ms")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--scheme", default="w8a8")
    parser.add_argument("--layers", type=int, help="only so many layers, spread over the model, for a quick look")
    given = parser.parse_args()
    layers(given.scheme, given.layers)
    large_map()
