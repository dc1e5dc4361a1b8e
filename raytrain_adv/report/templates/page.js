// Shows the values under the pointer. Without this script the page lacks nothing else but a button.
for (const area of document.querySelectorAll(".area")) {
  area.plot = JSON.parse(area.parentElement.dataset.plot);
  const left = Number(area.dataset.left), width = Number(area.dataset.right) - left;
  const hair = area.appendChild(document.createElement("div")); hair.className = "hair";
  const tip = area.appendChild(document.createElement("div")); tip.className = "tip";
  const place = x => {
    const {x: [low, high], log} = area.plot;
    return log ? Math.log(x / low) / Math.log(high / low) : (x - low) / (high - low);
  };
  const nearest = (points, at) =>
    points.reduce((a, b) => Math.abs(place(b[0]) - at) < Math.abs(place(a[0]) - at) ? b : a);
  const shown = x => x && Math.abs(x) < 1e-3 ? x.toExponential(2)
    : x.toLocaleString("en", {maximumSignificantDigits: 6});
  const show = event => {
    const box = area.getBoundingClientRect();
    const share = ((event.clientX - box.left) / box.width - left) / width;
    const plot = area.plot;
    const x = nearest(plot.series.filter(s => s[2].length).map(s => nearest(s[2], share)), share)[0];
    const at = left + width * place(x);
    hair.style.cssText = `display:block;left:${100 * at}%`;
    tip.textContent = plot.over + " " + (plot.over === "step" ? x.toLocaleString("en") : shown(x));
    for (const [name, color, points] of plot.series) {
      if (!points.length) continue;
      const point = nearest(points, place(x));
      if (point[0] !== x) continue;
      const line = tip.appendChild(document.createElement("div"));
      line.className = "key k" + color;
      line.textContent = name + "  " + shown(point[1]);
    }
    const side = at > .5 ? `right:${100 * (1 - at) + 1}%` : `left:${100 * at + 1}%`;
    tip.style.cssText = "display:block;" + side;
  };
  const hide = () => { hair.style.display = tip.style.display = "none"; };
  area.addEventListener("pointermove", show); area.addEventListener("pointerdown", show);
  area.addEventListener("pointerleave", hide);
}
const nice = (low, high, least) => {
  const rough = Math.max((high - low) / 4, least), ten = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map(n => n * ten).find(s => s >= rough * 0.999), found = [];
  for (let i = Math.ceil(low / step); i * step <= high; i++) found.push(Number((i * step).toPrecision(6)));
  return found;
};
const decades = (low, high) => {
  const found = [];
  for (let i = Math.ceil(Math.log10(low)); i <= Math.log10(high); i++) found.push(10 ** i);
  return found.length > 1 ? found : nice(low, high, 0);
};
// Zoom (drag over a plot; a double click shows all) and smoothing draw a plot again from its points.
for (const figure of document.querySelectorAll("figure[data-plot]")) {
  const plot = JSON.parse(figure.dataset.plot), areas = [...figure.querySelectorAll(".area")];
  if (plot.over !== "step" || !areas.length) continue;
  const tools = figure.appendChild(document.createElement("div")); tools.className = "tools";
  const label = tools.appendChild(document.createElement("label"));
  label.textContent = "smoothing ";
  const slider = label.appendChild(document.createElement("input"));
  Object.assign(slider, {type: "range", min: 0, max: 0.98, step: 0.02, value: 0});
  tools.appendChild(document.createElement("span")).textContent = "drag over the plot to zoom, double click shows all";
  const whole = plot.x.slice(), raw = plot.series.map(s => s[2]);
  const smooth = points => {
    const keep = Number(slider.value); let sum = 0, weight = 0;
    return points.map(([x, y]) => {
      sum = keep * sum + y; weight = keep * weight + 1; return [x, sum / weight];
    });
  };
  const redraw = () => {
    const [low, high] = plot.x;
    plot.series.forEach((s, i) => {
      s[2] = smooth(raw[i]).filter(p => p[0] >= low && p[0] <= high);
    });
    for (const area of areas) {
      const old = area.querySelector("svg:not(.own)"), box = old.viewBox.baseVal;
      area.querySelector(".own")?.remove();
      const same = !Number(slider.value) && low === whole[0] && high === whole[1];
      old.style.display = same ? "" : "none";
      if (same) continue;
      const left = box.width * Number(area.dataset.left), right = box.width * Number(area.dataset.right);
      const ys = plot.series.flatMap(s => s[2].map(p => p[1]));
      if (!ys.length) continue;
      let bottom = Math.min(...ys), top = Math.max(...ys);
      const scale = plot.ylog && bottom > 0 ? Math.log : y => y;
      if (bottom === top) { top += Math.abs(top) / 2 || 1; bottom -= Math.abs(bottom) / 2 || 1; }
      const X = x => left + (right - left) * (x - low) / (high - low);
      const Y = y => 16 + (box.height - 42) * (scale(top) - scale(y)) / (scale(top) - scale(bottom));
      let body = "";
      for (const y of scale === Math.log ? decades(bottom, top) : nice(bottom, top, 0))
        body += `<line x1="${left}" x2="${right}" y1="${Y(y)}" y2="${Y(y)}" stroke="var(--grid)"/>`
          + `<text x="${left - 8}" y="${Y(y) + 4}" text-anchor="end">${Number(y.toPrecision(6))}</text>`;
      for (const x of nice(low, high, 1))
        body += `<text x="${X(x)}" y="${box.height - 6}" text-anchor="middle">${x.toLocaleString("en")}</text>`;
      for (const [, color, points] of plot.series)
        body += `<polyline fill="none" stroke="var(--c${color})" stroke-width="1.6" points="${
          points.map(p => X(p[0]).toFixed(1) + "," + Y(p[1]).toFixed(1)).join(" ")}"/>`;
      old.insertAdjacentHTML("afterend", `<${"svg"} class="own" viewBox="0 0 ${box.width} ${box.height}"`
        + ` font-size="11" fill="var(--dim)">${body}</svg>`);
    }
    for (const area of areas) area.plot = plot;
  };
  slider.addEventListener("input", redraw);
  for (const area of areas) {
    let from = null;
    const at = event => {
      const box = area.getBoundingClientRect(), left = Number(area.dataset.left);
      const share = ((event.clientX - box.left) / box.width - left) / (Number(area.dataset.right) - left);
      return plot.x[0] + Math.min(Math.max(share, 0), 1) * (plot.x[1] - plot.x[0]);
    };
    area.addEventListener("pointerdown", event => { from = at(event); });
    area.addEventListener("pointerup", event => {
      const to = at(event);
      if (from !== null && Math.abs(to - from) > (plot.x[1] - plot.x[0]) / 50) {
        plot.x = [Math.min(from, to), Math.max(from, to)]; redraw();
      }
      from = null;
    });
    area.addEventListener("dblclick", () => { plot.x = whole.slice(); redraw(); });
  }
}
for (const button of document.querySelectorAll(".copied button")) {
  button.addEventListener("click", () => {
    const range = document.createRange(); range.selectNodeContents(button.nextElementSibling);
    const selection = getSelection(); selection.removeAllRanges(); selection.addRange(range);
    button.textContent = document.execCommand("copy") ? "copied" : "press Ctrl-C";
  });
}
