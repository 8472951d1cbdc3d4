"use strict";
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 40rem)");

  function themed(layout) {
    const css = getComputedStyle(document.documentElement);
    const ink = css.getPropertyValue("--ink").trim(), line = css.getPropertyValue("--line").trim(), card = css.getPropertyValue("--card").trim();
    const axis = (own) => ({ automargin: true, gridcolor: line, zerolinecolor: line, linecolor: line, ...own, tickfont: { size: 11 } });
    const out = { ...layout, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", dragmode: false,
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: ink }, hoverlabel: { bgcolor: card, bordercolor: line, font: { color: ink } },
      margin: { l: narrow.matches ? 8 : 48, r: 12, t: 28, b: 40 }, legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" } };
    for (const name of Object.keys(layout)) if (/^[xy]axis/.test(name)) out[name] = axis(layout[name]);
    return out;
  }

  async function draw() {
    const raw = Uint8Array.from(atob(document.getElementById("plotly").textContent), (c) => c.charCodeAt(0));
    const text = await new Response(new Blob([raw]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
    const script = document.createElement("script");
    script.textContent = text;
    document.head.append(script);
    const plots = [...document.querySelectorAll(".plot")].map((place) => {
      const { data, layout } = JSON.parse(place.querySelector("script").textContent);
      return { at: place.querySelector("div"), data, layout };
    });
    const config = { responsive: true, displayModeBar: false, displaylogo: false, showTips: false };
    const all = () => Promise.all(plots.map((p) => Plotly.react(p.at, p.data, themed(p.layout), config)));
    await all();
    dark.addEventListener("change", all);
    narrow.addEventListener("change", all);
    document.documentElement.dataset.plots = String(plots.length);
  }

  function number(cell) {
    const found = cell.replace("−", "-").match(/^[+-]?\d[\d,]*(\.\d+)?/);
    return found ? Number(found[0].replaceAll(",", "")) : null;
  }

  function sort(heading) {
    const table = heading.closest("table"), body = table.tBodies[0], column = heading.cellIndex;
    const down = heading.getAttribute("aria-sort") === "ascending";
    for (const other of heading.parentElement.cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = (row) => row.cells[column].textContent.trim();
    const rows = [...body.rows].sort((a, b) => {
      const [p, q] = [number(key(a)), number(key(b))];
      const order = p !== null && q !== null ? p - q : p !== null ? -1 : q !== null ? 1 : key(a).localeCompare(key(b), undefined, { numeric: true });
      return down ? -order : order;
    });
    body.append(...rows);
  }

  for (const button of document.querySelectorAll(".sortable th button")) button.addEventListener("click", () => sort(button.parentElement));
  draw();
})();
