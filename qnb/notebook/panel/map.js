// The layer map: one cell for each linear layer, blocks in rows and kinds of layer in columns.
// The kernel decides what a cell says and its colours; this draws, and tells which cells are selected.
// Names from the model are set as text, never as HTML.

function render({ model, el }) {
  const root = document.createElement("div");
  root.className = "qnb-map";
  // JupyterLab would take arrow keys and letters for itself.
  root.setAttribute("data-lm-suppress-shortcuts", "true");
  const grid = document.createElement("div");
  grid.className = "qnb-grid";
  grid.setAttribute("role", "grid");
  grid.setAttribute("aria-multiselectable", "true");
  grid.setAttribute("aria-label", "Linear layers: blocks in rows, kinds in columns");
  root.append(grid);
  el.append(root);

  let cells = [];   // elements, by number of the layer
  let places = [];  // [row, column, alone] of each
  let at = new Map();
  let selected = new Set(model.get("selected"));
  let anchor = 0;
  let focus = 0;
  let drag = null;

  const key = (row, column) => row * 100000 + column;

  function build() {
    const { rows, columns, cells: given } = model.get("places");
    places = given.map(([, row, column, alone]) => [row, column, alone]);
    at = new Map(places.map(([row, column], i) => [key(row, column), i]));
    grid.replaceChildren();
    grid.style.gridTemplateColumns = `auto repeat(${columns.length}, minmax(58px, 1fr))`;
    const corner = header("all", () => cells.map((_, i) => i), "select all layers");
    corner.classList.add("qnb-corner");
    place(corner, 1, 1);
    grid.append(corner);
    columns.forEach((name, c) => {
      const head = header(name, () => where((_, column, alone) => column === c && !alone), `select ${name} in every block`);
      head.classList.add("qnb-column");
      place(head, 1, c + 2);
      grid.append(head);
    });
    rows.forEach((name, r) => {
      const head = header(name, () => where((row) => row === r), `select all of ${name}`);
      head.classList.add("qnb-row");
      place(head, r + 2, 1);
      grid.append(head);
    });
    cells = given.map(([name, row, column, alone], i) => {
      const cell = document.createElement("div");
      cell.className = alone ? "qnb-cell qnb-alone" : "qnb-cell";
      cell.setAttribute("role", "gridcell");
      cell.dataset.layer = name;
      cell.dataset.index = i;
      cell.tabIndex = -1;
      place(cell, row + 2, column + 2);
      grid.append(cell);
      return cell;
    });
    paint();
    mark(new Set(), selected);
    setFocus(0, false);
  }

  function place(element, row, column) {
    element.style.gridRow = row;
    element.style.gridColumn = column;
  }

  function header(name, members, title) {
    const head = document.createElement("button");
    head.type = "button";
    head.textContent = name;
    head.title = title;
    head.tabIndex = -1;
    head.addEventListener("click", (event) => {
      const found = members();
      if (!found.length) return;
      anchor = found[0];
      setFocus(found[0], false);
      choose(event.shiftKey || event.ctrlKey || event.metaKey ? [...selected, ...found] : found);
    });
    return head;
  }

  const where = (test) => cells.map((_, i) => i).filter((i) => test(...places[i]));

  function paint() {
    model.get("faces").forEach(([words, paper, ink, title], i) => {
      const cell = cells[i];
      if (!cell) return;
      if (cell.textContent !== words) cell.textContent = words;
      cell.style.background = paper;
      cell.style.color = ink;
      cell.title = title;
      cell.setAttribute("aria-label", title);
    });
  }

  function mark(before, now) {
    for (const i of before) if (!now.has(i)) toggle(i, false);
    for (const i of now) toggle(i, true);
  }

  function toggle(i, on) {
    const cell = cells[i];
    if (!cell) return;
    cell.classList.toggle("qnb-selected", on);
    cell.setAttribute("aria-selected", on ? "true" : "false");
  }

  function choose(indices, save = true) {
    const now = new Set(indices);
    mark(selected, now);
    selected = now;
    if (!save) return;
    model.set("selected", [...now].sort((a, b) => a - b));
    model.save_changes();
  }

  function rectangle(from, to) {
    const [r1, c1] = places[from], [r2, c2] = places[to];
    const [top, bottom] = [Math.min(r1, r2), Math.max(r1, r2)];
    const [left, right] = [Math.min(c1, c2), Math.max(c1, c2)];
    return where((row, column) => row >= top && row <= bottom && column >= left && column <= right);
  }

  function setFocus(i, really = true) {
    if (!cells.length) return;
    if (cells[focus]) cells[focus].tabIndex = -1;
    focus = i;
    cells[i].tabIndex = 0;
    if (really) {
      cells[i].focus({ preventScroll: true });
      cells[i].scrollIntoView({ block: "nearest", inline: "nearest" });
    }
  }

  const numberOf = (target) => {
    const cell = target && target.closest ? target.closest(".qnb-cell") : null;
    return cell && grid.contains(cell) ? Number(cell.dataset.index) : null;
  };

  grid.addEventListener("pointerdown", (event) => {
    const i = numberOf(event.target);
    if (i === null || event.button !== 0) return;
    event.preventDefault();
    setFocus(i);
    if (event.shiftKey) {
      choose(rectangle(anchor, i));
    } else if (event.ctrlKey || event.metaKey) {
      anchor = i;
      const now = new Set(selected);
      now.has(i) ? now.delete(i) : now.add(i);
      choose(now);
    } else {
      anchor = i;
      drag = i;
      choose([i], false);
    }
  });

  const moved = (event) => {
    if (drag === null) return;
    const i = numberOf(document.elementFromPoint(event.clientX, event.clientY));
    if (i !== null && i !== focus) {
      setFocus(i);
      choose(rectangle(drag, i), false);
    }
  };
  const released = () => {
    if (drag === null) return;
    drag = null;
    choose(selected);
  };
  window.addEventListener("pointermove", moved);
  window.addEventListener("pointerup", released);

  const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  grid.addEventListener("keydown", (event) => {
    const [row, column] = places[focus] || [0, 0];
    if (event.key in steps) {
      const [down, right] = steps[event.key];
      // Over holes, and from a long row into a short one.
      let next = null;
      for (let n = 1; n <= 64 && next === null; n++) {
        next = at.get(key(row + down * n, column + right * n)) ?? (down ? at.get(key(row + down * n, 0)) : null) ?? null;
      }
      if (next !== null) {
        setFocus(next);
        if (event.shiftKey) choose(rectangle(anchor, next));
      }
    } else if (event.key === " " || event.key === "Enter") {
      anchor = focus;
      if (event.ctrlKey || event.metaKey) {
        const now = new Set(selected);
        now.has(focus) ? now.delete(focus) : now.add(focus);
        choose(now);
      } else choose([focus]);
    } else if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "a") {
      choose(cells.map((_, i) => i));
    } else if (event.key === "Escape") {
      choose([]);
    } else return;
    event.preventDefault();
    event.stopPropagation();
  });

  model.on("change:places", build);
  model.on("change:faces", paint);
  model.on("change:selected", () => {
    const now = new Set(model.get("selected"));
    mark(selected, now);
    selected = now;
  });

  // The record below is for a page without a kernel: while this panel lives, it is hidden.
  const hide = document.createElement("style");
  const record = model.get("record").replace(/[^\w-]/g, "");
  hide.textContent = record ? `.qnb-record.${record} { display: none; }` : "";
  document.head.append(hide);

  build();
  return () => {
    hide.remove();
    window.removeEventListener("pointermove", moved);
    window.removeEventListener("pointerup", released);
  };
}

export default { render };
