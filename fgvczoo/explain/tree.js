// Zooms, pans and folds the drawings of trees. Reads numbers from data attributes only.
document.addEventListener("DOMContentLoaded", () => {
  for (const figure of document.querySelectorAll(".tree")) start(figure);

  function start(figure) {
    const svg = figure.querySelector("svg");
    const step = Number(svg.dataset.step), width = Number(svg.dataset.width);
    const nodes = new Map(), folded = new Set();
    for (const element of svg.querySelectorAll("[data-node]")) {
      const { node, left, right } = element.dataset;
      nodes.set(node, { element, height: Number(element.dataset.height), below: left ? [left, right] : [] });
    }
    const edges = [...svg.querySelectorAll("[data-to]")].map((element) => ({ element, ...element.dataset }));
    const root = nodes.keys().next().value;

    function layout() {
      let bottom = 0;
      for (const each of nodes.values()) each.shown = false;
      (function place(key, depth) {
        const node = nodes.get(key);
        node.shown = true;
        node.x = depth * step;
        if (!node.below.length || folded.has(key)) {
          node.y = bottom + node.height / 2;
          bottom += node.height + 8;
        } else {
          node.below.forEach((child) => place(child, depth + 1));
          node.y = (nodes.get(node.below[0]).y + nodes.get(node.below[1]).y) / 2;
        }
      })(root, 0);
      for (const [key, node] of nodes) {
        node.element.classList.toggle("hidden", !node.shown);
        node.element.classList.toggle("folded", folded.has(key));
        if (node.shown) node.element.setAttribute("transform", `translate(${node.x},${node.y})`);
      }
      for (const { element, from, to } of edges) {
        const a = nodes.get(from), b = nodes.get(to);
        element.classList.toggle("hidden", !b.shown);
        if (b.shown) element.setAttribute("d", curve(a.x + width, a.y, b.x, b.y));
      }
    }
    const curve = (x, y, u, v) => `M${x},${y}C${(x + u) / 2},${y} ${(x + u) / 2},${v} ${u},${v}`;

    let view;
    function look(next) {
      view = next;
      svg.setAttribute("viewBox", `${view.x} ${view.y} ${view.w} ${view.h}`);
    }
    function fit() {
      const box = svg.getBBox();
      const ratio = (box.height + 40) / (box.width + 40); // no taller than it needs to be
      svg.style.height = `${Math.max(260, Math.min(0.8 * innerHeight, ratio * svg.clientWidth))}px`;
      const frame = svg.getBoundingClientRect();
      const w = Math.max(box.width + 40, ((box.height + 40) * frame.width) / frame.height);
      const h = (w * frame.height) / frame.width;
      look({ x: box.x + box.width / 2 - w / 2, y: box.y + box.height / 2 - h / 2, w, h });
    }
    function zoom(factor, x = view.x + view.w / 2, y = view.y + view.h / 2) {
      look({ x: x - (x - view.x) * factor, y: y - (y - view.y) * factor, w: view.w * factor, h: view.h * factor });
    }
    const point = (event) => new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());

    svg.addEventListener("wheel", (event) => {
      event.preventDefault();
      const { x, y } = point(event);
      zoom(event.deltaY > 0 ? 1.2 : 1 / 1.2, x, y);
    }, { passive: false });
    let last = null, moved = false;
    svg.addEventListener("pointerdown", (event) => { last = point(event); moved = false; });
    svg.addEventListener("pointermove", (event) => {
      if (!last || !event.buttons) return;
      const now = point(event);
      if (Math.hypot(now.x - last.x, now.y - last.y) * svg.getBoundingClientRect().width > 4 * view.w) moved = true;
      if (!moved) return;
      svg.classList.add("drag");
      look({ ...view, x: view.x + last.x - now.x, y: view.y + last.y - now.y });
      last = point(event);
    });
    window.addEventListener("pointerup", () => { last = null; svg.classList.remove("drag"); });

    function toggle(key) {
      const before = nodes.get(key).y;
      folded.has(key) ? folded.delete(key) : folded.add(key);
      layout();
      look({ ...view, y: view.y + nodes.get(key).y - before }); // the node stays where it was clicked
    }
    for (const [key, node] of nodes) {
      if (!node.below.length) continue;
      node.element.addEventListener("click", () => { if (!moved) toggle(key); });
      node.element.addEventListener("keydown", (event) => { if (event.key === "Enter") toggle(key); });
    }
    const actions = {
      fit,
      in: () => zoom(1 / 1.4),
      out: () => zoom(1.4),
      open: () => { folded.clear(); layout(); fit(); },
      fold: () => {
        for (const [key, node] of nodes) if (node.below.length && node.x >= 2 * step) folded.add(key);
        layout();
        fit();
      },
    };
    for (const button of figure.querySelectorAll("[data-do]")) button.addEventListener("click", actions[button.dataset.do]);

    // The path of an image: everything beside it folded.
    function show(path) {
      folded.clear();
      for (const [key, node] of nodes) {
        node.element.classList.toggle("on", path.has(key));
        if (!path.has(key) && node.below.length) folded.add(key);
      }
      for (const { element, to } of edges) element.classList.toggle("on", path.has(to));
      layout();
      fit();
    }
    layout();
    fit();
    const buttons = [...document.querySelectorAll(`[data-path][data-tree="${figure.dataset.tree}"]`)];
    for (const button of buttons) {
      const path = new Set(button.dataset.path.split(" "));
      button.addEventListener("click", () => { show(path); figure.scrollIntoView({ behavior: "smooth" }); });
    }
    if (buttons.length) show(new Set(buttons[0].dataset.path.split(" ")));
  }
});
