// Shows the values under the pointer. Without this script the page lacks nothing else but a button.
for (const area of document.querySelectorAll(".area")) {
  const plot = JSON.parse(area.parentElement.dataset.plot), [low, high] = plot.x;
  const left = Number(area.dataset.left), width = Number(area.dataset.right) - left;
  const hair = area.appendChild(document.createElement("div")); hair.className = "hair";
  const tip = area.appendChild(document.createElement("div")); tip.className = "tip";
  const place = x => plot.log ? Math.log(x / low) / Math.log(high / low) : (x - low) / (high - low);
  const nearest = (points, at) =>
    points.reduce((a, b) => Math.abs(place(b[0]) - at) < Math.abs(place(a[0]) - at) ? b : a);
  const shown = x => x && Math.abs(x) < 1e-3 ? x.toExponential(2)
    : x.toLocaleString("en", {maximumSignificantDigits: 6});
  const show = event => {
    const box = area.getBoundingClientRect();
    const share = ((event.clientX - box.left) / box.width - left) / width;
    const x = nearest(plot.series.map(s => nearest(s[2], share)), share)[0];
    const at = left + width * place(x);
    hair.style.cssText = `display:block;left:${100 * at}%`;
    tip.textContent = plot.over + " " + (plot.over === "step" ? x.toLocaleString("en") : shown(x));
    for (const [name, color, points] of plot.series) {
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
for (const button of document.querySelectorAll(".copied button")) {
  button.addEventListener("click", () => {
    const range = document.createRange(); range.selectNodeContents(button.nextElementSibling);
    const selection = getSelection(); selection.removeAllRanges(); selection.addRange(range);
    button.textContent = document.execCommand("copy") ? "copied" : "press Ctrl-C";
  });
}
