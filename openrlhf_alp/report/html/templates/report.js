"use strict";
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function themed(layout) {
  const axis = { gridcolor: css("--grid"), linecolor: css("--line"), automargin: true };
  const themedLayout = {
    ...layout,
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", hovermode: "closest",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: css("--soft") },
    hoverlabel: { bgcolor: css("--paper"), bordercolor: css("--line"), font: { color: css("--ink") } },
    legend: { orientation: "h", y: 1, yanchor: "bottom", x: 0 },
    coloraxis: { colorscale: "RdBu", cmid: 0, colorbar: { thickness: 12, outlinewidth: 0, ticksuffix: " %" } },
  };
  for (const key of Object.keys(layout)) {
    if (/^[xy]axis/.test(key)) themedLayout[key] = { ...axis, ...layout[key] };
  }
  return themedLayout;
}

async function draw() {
  const script = document.createElement("script");
  script.textContent = new TextDecoder().decode(await unpack("plotly"));
  document.head.append(script);
  const figures = JSON.parse(document.getElementById("figures").textContent);
  // Without its bar of buttons, which covers titles: dragging zooms, a double click goes back.
  const config = { displayModeBar: false, responsive: true };
  for (const { key, data, layout } of figures) {
    await Plotly.newPlot(document.querySelector(`.plot[data-key="${key}"]`), data, themed(layout), config);
  }
  document.documentElement.dataset.drawn = String(figures.length);
}

function showMethod(chip) {
  const on = chip.getAttribute("aria-pressed") !== "true";
  chip.setAttribute("aria-pressed", String(on));
  for (const plot of document.querySelectorAll(".plot")) {
    const traces = (plot.data || []).flatMap((trace, at) => (trace.meta === chip.dataset.method ? [at] : []));
    if (traces.length) Plotly.restyle(plot, { visible: on }, traces);
  }
}

function showTab(tab) {
  for (const other of document.querySelectorAll("[data-tab]")) {
    other.setAttribute("aria-selected", String(other === tab));
    document.getElementById(`tab-${other.dataset.tab}`).hidden = other !== tab;
  }
}

document.querySelectorAll(".chip").forEach((chip) => chip.addEventListener("click", () => showMethod(chip)));
document.querySelectorAll("[data-tab]").forEach((tab) => tab.addEventListener("click", () => showTab(tab)));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => location.reload());
draw().catch((error) => {
  document.querySelectorAll(".plot").forEach((plot) => {
    plot.textContent = `The charts could not be drawn (${error.message}). Take a browser of 2023 or later, or the PNG files.`;
  });
  throw error;
});
