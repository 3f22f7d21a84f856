// The steps tried: a list, a plot of size against distance from the original, and the code that repeats one.

const SVG = "http://www.w3.org/2000/svg";

function node(name, attributes = {}, text = null) {
  const made = document.createElementNS(SVG, name);
  for (const [k, v] of Object.entries(attributes)) made.setAttribute(k, v);
  if (text !== null) made.textContent = text;
  return made;
}

function render({ model, el }) {
  const root = document.createElement("div");
  root.className = "qnb-history";
  root.setAttribute("data-lm-suppress-shortcuts", "true");
  const list = document.createElement("ol");
  list.className = "qnb-steps";
  const plot = node("svg", { viewBox: "0 0 460 250", class: "qnb-pareto", role: "group", "aria-label": "steps by size and distance" });
  const code = document.createElement("div");
  code.className = "qnb-code";
  const pre = document.createElement("pre");
  const copy = document.createElement("button");
  copy.type = "button";
  copy.className = "qnb-button";
  copy.textContent = "Copy as code";
  copy.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(pre.textContent);
      copy.textContent = "Copied";
    } catch {
      // A page without https has no clipboard: the person copies the selected text.
      const range = document.createRange();
      range.selectNodeContents(pre);
      getSelection().removeAllRanges();
      getSelection().addRange(range);
      copy.textContent = "Selected: press Ctrl+C";
    }
    setTimeout(() => (copy.textContent = "Copy as code"), 2000);
  });
  code.append(pre, copy);
  root.append(list, plot, code);
  el.append(root);

  const go = (number) => model.send({ go: number });

  function draw() {
    const { steps, at, error, size } = model.get("history");
    list.replaceChildren(
      ...steps.map((step) => {
        const item = document.createElement("li");
        const button = document.createElement("button");
        button.type = "button";
        button.className = step.number === at ? "qnb-here" : "";
        button.setAttribute("aria-current", step.number === at ? "step" : "false");
        const number = document.createElement("b");
        number.textContent = step.number;
        const words = document.createElement("span");
        words.textContent = step.words;
        const value = document.createElement("i");
        value.textContent = step.shown;
        button.append(number, words, value);
        button.addEventListener("click", () => go(step.number));
        item.append(button);
        return item;
      }),
    );
    pre.textContent = model.get("code");
    chart(steps, at, error, size);
  }

  function chart(steps, at, error, size) {
    plot.replaceChildren();
    const known = steps.filter((s) => s.x !== null && s.y !== null);
    const box = { left: 58, right: 440, top: 14, bottom: 206 };
    plot.append(node("line", { class: "qnb-axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }));
    plot.append(node("line", { class: "qnb-axis", x1: box.left, x2: box.left, y1: box.top, y2: box.bottom }));
    plot.append(node("text", { x: (box.left + box.right) / 2, y: 244, "text-anchor": "middle" }, size));
    plot.append(node("text", { x: 12, y: (box.top + box.bottom) / 2, "text-anchor": "middle", transform: `rotate(-90 12 ${(box.top + box.bottom) / 2})` }, error));
    if (!known.length) return;
    const xs = known.map((s) => s.x), positive = known.filter((s) => s.y > 0).map((s) => s.y);
    let [x0, x1] = [Math.min(...xs), Math.max(...xs)];
    const pad = (x1 - x0 || x1 || 1) * 0.08;
    [x0, x1] = [x0 - pad, x1 + pad];
    const lowest = positive.length ? Math.min(...positive) : 0.001;
    const highest = positive.length ? Math.max(...positive) : 1;
    const d0 = Math.floor(Math.log10(lowest)), d1 = Math.max(d0 + 1, Math.ceil(Math.log10(highest)));
    // A logarithmic scale has no zero: the original, at distance 0, stands on the axis, below a gap.
    const gap = 26;
    const X = (x) => box.left + ((x - x0) / (x1 - x0)) * (box.right - box.left);
    const Y = (y) => (y > 0 ? box.bottom - gap - ((Math.log10(y) - d0) / (d1 - d0)) * (box.bottom - gap - box.top) : box.bottom);
    for (let d = d0; d <= d1; d++) {
      const y = Y(10 ** d);
      plot.append(node("line", { class: "qnb-rule", x1: box.left, x2: box.right, y1: y, y2: y }));
      plot.append(node("text", { x: box.left - 6, y: y + 4, "text-anchor": "end" }, d >= -3 && d < 4 ? String(Number((10 ** d).toPrecision(1))) : `1e${d}`));
    }
    plot.append(node("text", { x: box.left - 6, y: box.bottom + 4, "text-anchor": "end" }, "0"));
    for (let i = 0; i <= 3; i++) {
      const x = x0 + ((x1 - x0) * i) / 3;
      plot.append(node("text", { x: X(x), y: box.bottom + 18, "text-anchor": "middle" }, x.toPrecision(3)));
    }
    const front = known.filter((s) => !known.some((o) => o !== s && o.x <= s.x && o.y <= s.y && (o.x < s.x || o.y < s.y)));
    front.sort((a, b) => a.x - b.x);
    plot.append(node("polyline", { class: "qnb-front", points: front.map((s) => `${X(s.x)},${Y(s.y)}`).join(" ") }));
    for (const s of [...known].sort((a, b) => (a.number === at) - (b.number === at))) {
      const point = node("g", { class: `qnb-point${s.number === at ? " qnb-here" : ""}`, tabindex: 0, role: "button", "aria-label": `go to step ${s.number}: ${s.words}`, "data-step": s.number });
      point.append(node("circle", { cx: X(s.x), cy: Y(s.y), r: 9 }));
      point.append(node("text", { x: X(s.x), y: Y(s.y) + 4, "text-anchor": "middle" }, s.number));
      point.append(node("title", {}, `${s.words}: ${s.shown}`));
      point.addEventListener("click", () => go(s.number));
      point.addEventListener("keydown", (event) => {
        if (event.key === "Enter" || event.key === " ") {
          event.preventDefault();
          go(s.number);
        }
      });
      plot.append(point);
    }
  }

  model.on("change:history", draw);
  model.on("change:code", () => (pre.textContent = model.get("code")));
  draw();
}

export default { render };
