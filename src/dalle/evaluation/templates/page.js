"use strict";
const charts = JSON.parse(document.getElementById("charts").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const touch = matchMedia("(pointer: coarse)").matches;

function colours() {
  const style = getComputedStyle(document.documentElement);
  const [text, line, paper] = ["--text", "--line", "--paper"].map((name) => style.getPropertyValue(name).trim());
  const layout = { "font.color": text, "hoverlabel.bgcolor": paper, "hoverlabel.font.color": text };
  for (const axis of ["xaxis", "yaxis"]) {
    layout[`${axis}.gridcolor`] = line;
    layout[`${axis}.zerolinecolor`] = line;
  }
  return layout;
}

for (const place of document.querySelectorAll("[data-chart]")) {
  const chart = charts[Number(place.dataset.chart)];
  const layout = {
    ...chart.layout,
    dragmode: touch ? false : "zoom", // a finger scrolls the page
  };
  const shown = Plotly.newPlot(place, chart.data, layout, {
    responsive: true,
    displayModeBar: false,
  });
  shown.then(() => Plotly.relayout(place, colours()));
}
dark.addEventListener("change", () => {
  for (const place of document.querySelectorAll("[data-chart]")) Plotly.relayout(place, colours());
});

for (const button of document.querySelectorAll("[data-scale]")) {
  button.addEventListener("click", () => {
    const log = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(log));
    button.textContent = log ? "linear scale" : "log scale";
    const place = button.closest(".chart").querySelector("[data-chart]");
    Plotly.relayout(place, { [`${button.dataset.scale}.type`]: log ? "log" : "linear",
      [`${button.dataset.scale}.autorange`]: true });
  });
}

// A run is switched on and off in all charts of its section
for (const box of document.querySelectorAll("input[data-run]")) {
  box.addEventListener("change", () => {
    for (const place of box.closest("section").querySelectorAll("[data-chart]")) {
      const own = place.data.flatMap((trace, k) => (trace.meta === Number(box.dataset.run) ? [k] : []));
      if (own.length) Plotly.restyle(place, { visible: box.checked ? true : "legendonly" }, own);
    }
  });
}

const dialog = document.querySelector("dialog");
const pictures = [...document.querySelectorAll(".picture")];
let current = 0;
function enlarge(k) {
  current = (k + pictures.length) % pictures.length;
  const small = pictures[current].querySelector("img");
  const large = dialog.querySelector("img");
  large.src = small.src;
  large.alt = small.alt;
  large.className = small.naturalWidth < 700 ? "pixels" : ""; // small ones show their pixels
  dialog.querySelector("p").textContent = small.alt;
  if (!dialog.open) dialog.showModal();
}
pictures.forEach((picture, k) => picture.addEventListener("click", () => enlarge(k)));
dialog.addEventListener("click", () => dialog.close());
dialog.addEventListener("keydown", (event) => {
  if (event.key === "ArrowRight") enlarge(current + 1);
  if (event.key === "ArrowLeft") enlarge(current - 1);
});

for (const button of document.querySelectorAll("[data-copy]")) {
  button.addEventListener("click", async () => {
    const lines = button.closest(".commands").querySelector("pre");
    try {
      await navigator.clipboard.writeText(lines.textContent);
      button.textContent = "copied";
    } catch {
      getSelection().selectAllChildren(lines); // a page from a disk may not be let at the clipboard
      button.textContent = "selected";
    }
    setTimeout(() => (button.textContent = "copy"), 2000);
  });
}
