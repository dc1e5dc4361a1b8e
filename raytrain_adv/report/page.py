"""The frame of report.html: its style and script, all in the one file."""

from html import escape

# The page loads nothing, and neither can text from a dataset that is shown in it.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

STYLE = """
:root{color-scheme:light dark;--bg:#f6f7f9;--card:#fff;--ink:#1b1f27;--dim:#667080;--line:#e3e6eb;
--grid:#eceef2;--code:#f3f4f7;--c1:#2f5fe0;--c2:#d9730d;--good:#137a4b;--goodbg:#dff3e8;
--bad:#b3261e;
--badbg:#fde8e6;--busy:#8a5a00;--busybg:#fdf0d5;--shadow:0 1px 2px #1b1f2710}
@media (prefers-color-scheme:dark){:root{--bg:#0f1218;--card:#171b23;--ink:#e6e9ef;--dim:#949eae;
--line:#282e39;--grid:#222833;--code:#10141b;--c1:#7aa5ff;--c2:#f5a04a;--good:#5fd39a;
--goodbg:#12301f;
--bad:#ff8a80;--badbg:#3a1614;--busy:#f0c060;--busybg:#352a10;--shadow:none}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",
Roboto,"Helvetica Neue",Arial,sans-serif;-webkit-text-size-adjust:100%}
main{max-width:1120px;margin:0 auto;padding:32px 20px 48px}
header{margin-bottom:24px}
h1{font-size:26px;line-height:1.2;margin:0;overflow-wrap:anywhere}
h2{font-size:17px;margin:36px 0 12px}
h3{font-size:15px;margin:0 0 4px}
p{margin:0 0 8px}
.title{display:flex;align-items:center;gap:12px;flex-wrap:wrap}
.sub{color:var(--dim);margin-top:6px;overflow-wrap:anywhere}
.sub span+span:before{content:"\\00b7";margin:0 .5em}
.status{font-size:13px;font-weight:600;padding:2px 11px;border-radius:99px}
.done{color:var(--good);background:var(--goodbg)}.failed{color:var(--bad);background:var(--badbg)}
.running,.stopped{color:var(--busy);background:var(--busybg)}
.card,.plot{background:var(--card);border:1px solid var(--line);border-radius:10px;
box-shadow:var(--shadow);
padding:16px 18px}
.card+.card{margin-top:12px}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(140px,1fr));gap:12px}
.figures .card{margin:0;padding:12px 14px}
.figures dt{color:var(--dim);font-size:13px}
.figures dd{margin:0;font-size:22px;font-weight:600;font-variant-numeric:tabular-nums;
line-height:1.35;
white-space:nowrap}
.figures dd small{font-size:13px;font-weight:500;color:var(--dim)}
.figures .more{font-size:13px;color:var(--dim);font-weight:400;line-height:1.4;white-space:normal}
.error{border-color:var(--bad);border-left-width:4px;margin-bottom:20px}
.error h2{margin:0 0 10px;color:var(--bad);font-size:18px;overflow-wrap:anywhere}
.error dl{display:grid;grid-template-columns:max-content 1fr;gap:6px 14px;margin:0}
.error dt{color:var(--dim)}.error dd{margin:0;white-space:pre-wrap;overflow-wrap:anywhere}
.plots{display:flex;flex-wrap:wrap;gap:12px}
.plot{margin:0;padding:12px 14px 8px;min-width:0}.wide{flex:1 1 100%}.half{flex:1 1 40%}
.third{flex:1 1 28%}
figcaption{display:flex;gap:4px 10px;align-items:baseline;flex-wrap:wrap;margin-bottom:12px}
.unit,.keys{color:var(--dim);font-size:13px}.keys{margin-left:auto;display:flex;gap:2px 14px;
flex-wrap:wrap}
.key:before{content:"";display:inline-block;width:14px;height:3px;border-radius:2px;
margin-right:6px;
vertical-align:middle;background:currentColor}
.k1:before{background:var(--c1)}.k1.pale:before{opacity:.35}.k2:before{background:var(--c2)}
.area{position:relative;height:190px;margin:0 12px 26px 46px;touch-action:pan-y}
.wide .area{height:280px}
.area svg{position:absolute;inset:0;width:100%;height:100%;overflow:visible}
.area path{fill:none;vector-effect:non-scaling-stroke;stroke-linejoin:round;stroke-linecap:round}
.grid{stroke:var(--grid);stroke-width:1}
.line{stroke-width:1.8}.faint{stroke-width:1;opacity:.32}.thin{stroke-width:1;opacity:.55}
.dots{stroke-width:7}
.c1{stroke:var(--c1)}.c2{stroke:var(--c2)}
.level{stroke:var(--c2);stroke-width:1.4;stroke-dasharray:6 5}
.mark{stroke:var(--dim);stroke-width:1;stroke-dasharray:3 4}.mark.alarm{stroke:var(--bad);
stroke-width:1.6}
.area span{position:absolute;font-size:12px;line-height:1;color:var(--dim);white-space:nowrap;
font-variant-numeric:tabular-nums}
.ty{right:calc(100% + 8px);transform:translateY(50%)}
.tx{top:calc(100% + 9px);transform:translateX(-50%)}
.area .on-mark{top:-2px;padding:0 5px}.area .on-mark.alarm{color:var(--bad);top:14px}
.area .on-level{right:2px;margin-bottom:4px;color:var(--c2)}
.hair{position:absolute;top:0;bottom:0;width:1px;background:var(--dim);pointer-events:none;
display:none}
.tip{position:absolute;top:6px;z-index:2;background:var(--card);border:1px solid var(--line);
border-radius:6px;
padding:5px 9px;font-size:12px;line-height:1.5;pointer-events:none;display:none;
white-space:nowrap;
box-shadow:0 2px 8px #0003;font-variant-numeric:tabular-nums}
table{border-collapse:collapse;width:100%;font-size:14px}
th,td{text-align:left;padding:5px 12px 5px 0;vertical-align:top;
border-bottom:1px solid var(--grid)}
tr:last-child td{border-bottom:0}
th{color:var(--dim);font-weight:500;font-size:13px}
td{overflow-wrap:anywhere}
.num,.num:last-child{text-align:right;padding-right:0;font-variant-numeric:tabular-nums;
white-space:nowrap;padding-left:12px}
.short td:first-child{white-space:nowrap;overflow-wrap:normal}
.scroll{overflow-x:auto}a{color:var(--c1)}
.two{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:12px}.two .card{margin:0}
details{margin-top:10px}.card>details:first-child{margin-top:0}
.bar+.note,.after{margin-top:12px}summary{cursor:pointer;color:var(--dim)}summary:hover{color:var(--ink)}
details[open]>summary{margin-bottom:8px}
.note{color:var(--dim);font-size:14px}
.badge{font-weight:400;color:var(--dim);margin-left:8px;font-size:14px}
ul{margin:4px 0;padding-left:20px}li{overflow-wrap:anywhere}
code,pre{font:13px/1.55 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
pre{background:var(--code);border:1px solid var(--line);border-radius:8px;padding:12px 14px;
margin:0;
overflow:auto;white-space:pre-wrap;overflow-wrap:anywhere;max-height:480px}
.copied{position:relative}.copied button{position:absolute;top:8px;right:8px;font:inherit;
font-size:13px;
color:var(--ink);background:var(--card);border:1px solid var(--line);border-radius:6px;
padding:2px 10px;
cursor:pointer}
.turn+.turn{margin-top:10px}.turn b{display:block;font-size:13px;font-weight:500;color:var(--dim);
margin-bottom:3px}
.turn.answer pre{border-left:3px solid var(--c1)}
.bar{display:grid;grid-template-columns:minmax(90px,200px) 1fr max-content;gap:4px 12px;
align-items:center;
font-size:14px}
.bar i{display:block;height:10px;border-radius:3px;background:var(--c1);min-width:2px}
.bar .faded{background:var(--c2)}
.bar .track{background:var(--grid);border-radius:3px}
.bar .num{padding-left:0}
.hist{display:flex;align-items:flex-end;gap:2px;height:74px;margin-top:12px}
.hist i{flex:1;background:var(--c1);border-radius:2px 2px 0 0;min-height:1px}
.ends{display:flex;justify-content:space-between;color:var(--dim);font-size:12px;
border-top:1px solid var(--line);padding-top:3px}
footer{color:var(--dim);font-size:13px;margin-top:36px}
@media (max-width:720px){main{padding:20px 12px 32px}.two{grid-template-columns:minmax(0,1fr)}
.half,.third{flex-basis:100%}
.wide .area{height:220px}.area{height:170px}.card{padding:13px 14px}h1{font-size:22px}
.figures{grid-template-columns:repeat(2,minmax(0,1fr));gap:8px}.figures .card{padding:10px 12px}
.figures dd{font-size:19px}.bar{grid-template-columns:minmax(80px,34%) 1fr max-content}
.error dl{grid-template-columns:1fr}.error dd{margin-bottom:8px}}
@media print{body{background:none}.card,.plot{break-inside:avoid;box-shadow:none}
button{display:none}}
"""

SCRIPT = """
for (const area of document.querySelectorAll(".area")) {
  const plot = JSON.parse(area.dataset.plot), [low, high] = plot.x;
  const hair = area.appendChild(document.createElement("div")); hair.className = "hair";
  const tip = area.appendChild(document.createElement("div")); tip.className = "tip";
  const place = x => plot.log ? Math.log(x / low) / Math.log(high / low) : (x - low) / (high - low);
  const nearest = (points, at) =>
    points.reduce((a, b) => Math.abs(place(b[0]) - at) < Math.abs(place(a[0]) - at) ? b : a);
  const shown = x => x && Math.abs(x) < 1e-3 ? x.toExponential(2)
    : x.toLocaleString("en", {maximumSignificantDigits: 6});
  const show = event => {
    const box = area.getBoundingClientRect(), share = (event.clientX - box.left) / box.width;
    const x = nearest(plot.series.map(s => nearest(s[2], share)), share)[0], left = place(x);
    hair.style.cssText = `display:block;left:${100 * left}%`;
    tip.textContent = plot.over + " " + (plot.over === "step" ? x.toLocaleString("en") : shown(x));
    for (const [name, color, points] of plot.series) {
      const point = nearest(points, left);
      if (point[0] !== x) continue;
      const line = tip.appendChild(document.createElement("div"));
      line.className = "key k" + color;
      line.textContent = name + "  " + shown(point[1]);
    }
    const side = left > .5 ? `right:${100 * (1 - left) + 1}%` : `left:${100 * left + 1}%`;
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
"""


def page(title: str, body: str) -> str:
    """Return the whole document around a body of finished HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><main>{body}</main><script>{SCRIPT}</script></body></html>\n"
    )


def text(value: object) -> str:
    """Return a value from outside as text of a page: no markup, no control characters."""
    clean = "".join(
        c if c >= " " or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in str(value)
    )
    return escape(clean)
