"use strict";
// Reads one step in all charts at once. The page is complete without it.
(() => {
  const root = document.documentElement;
  root.classList.add("script");
  window.addEventListener("error", (event) => { root.dataset.scriptError = event.message; });
  document.addEventListener("securitypolicyviolation", (event) => { root.dataset.blocked = event.violatedDirective; });
  const SVG = "http://www.w3.org/2000/svg";

  const nearest = (steps, step) => {
    let low = 0, high = steps.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (steps[middle] <= step) low = middle; else high = middle;
    }
    return Math.abs(steps[low] - step) <= Math.abs(steps[high] - step) ? low : high;
  };

  const show = (value, percent) => {
    if (value === null) return "not finite";
    if (percent) return (100 * value).toFixed(1) + " %";
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size < 1e-3 || size >= 1e7) return value.toExponential(2);
    return size >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)));
  };

  const place = ([low, high, start, end], value, log) => {
    const scale = log ? Math.log10 : (x) => x;
    return start + ((scale(value) - scale(low)) / (scale(high) - scale(low))) * (end - start);
  };

  const makeChart = (svg) => {
    const data = JSON.parse(svg.dataset.chart);
    const readout = svg.parentElement.querySelector(".readout");
    const resting = [...readout.childNodes];
    const cursor = svg.querySelector(".cursor");
    const dots = data.series.map(() => cursor.appendChild(document.createElementNS(SVG, "circle")));
    dots.forEach((dot) => dot.setAttribute("r", 3.4));
    const steps = [...new Set(data.series.flatMap((series) => series.step))].sort((a, b) => a - b);

    const at = (step) => {
      if (step < data.x[0] || step > data.x[1]) return rest();
      const found = steps[nearest(steps, step)];
      const line = cursor.querySelector("line");
      const x = place(data.x, found, data.log_steps);
      line.setAttribute("x1", x);
      line.setAttribute("x2", x);
      let base = 0;
      const texts = data.series.map((series, row) => {
        const index = nearest(series.step, found);
        const value = series.value[index];
        if (value !== null) base = data.stacked ? base + value : value;
        dots[row].setAttribute("visibility", value === null ? "hidden" : "inherit");
        if (value !== null) {
          dots[row].setAttribute("cx", place(data.x, series.step[index], data.log_steps));
          dots[row].setAttribute("cy", place(data.y, base, data.log));
        }
        return `${data.series.length > 1 ? series.name + " " : ""}${show(value, data.percent)}`;
      });
      if (data.stacked) texts.push(`together ${show(base, false)}`);
      const text = document.createElement("span");
      text.textContent = `${data.point} ${found.toLocaleString("en")}: ${texts.join(" \u00b7 ")}`;
      readout.replaceChildren(text);
      readout.classList.add("live");
      cursor.setAttribute("visibility", "visible");
    };

    const rest = () => {
      readout.replaceChildren(...resting);
      readout.classList.remove("live");
      cursor.setAttribute("visibility", "hidden");
    };
    return { svg, data, steps, readout, at, rest };
  };

  const start = () => {
    let charts = [], step = null;
    // samples and tokens are counted otherwise than steps: only charts over the same unit move together
    const go = (to, unit) => { step = to; charts.filter((chart) => chart.data.point === unit).forEach((chart) => chart.at(to)); };
    const leave = () => { step = null; charts.forEach((chart) => chart.rest()); };
    const bind = (chart) => {
      const { svg, data, steps, readout } = chart;
      svg.addEventListener("pointermove", (event) => {
        const box = svg.getBoundingClientRect();
        const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
        const share = (x - data.x[2]) / (data.x[3] - data.x[2]);
        const [low, high] = data.x, kept = Math.min(1, Math.max(0, share));
        const wanted = data.log_steps ? low * (high / low) ** kept : low + kept * (high - low);
        go(steps[nearest(steps, wanted)], data.point);
      });
      svg.addEventListener("pointerleave", leave);
      svg.addEventListener("focus", () => readout.setAttribute("aria-live", "polite"));
      svg.addEventListener("blur", () => { readout.removeAttribute("aria-live"); leave(); });
      svg.addEventListener("keydown", (event) => {
        const now = step === null ? -1 : nearest(steps, step);
        const many = Math.max(1, Math.round(steps.length / 10));
        const to = {
          ArrowRight: now + 1, ArrowLeft: now < 0 ? steps.length - 1 : now - 1, PageDown: now + many, PageUp: now - many,
          Home: 0, End: steps.length - 1,
        }[event.key];
        if (event.key === "Escape") leave();
        if (to === undefined) return;
        event.preventDefault();
        go(steps[Math.min(steps.length - 1, Math.max(0, to))], data.point);
      });
      return chart;
    };
    // parts of a live page are replaced, with the charts in them
    const find = () => {
      const known = new Map(charts.map((chart) => [chart.svg, chart]));
      charts = [...document.querySelectorAll("svg.chart")].map((svg) => known.get(svg) ?? bind(makeChart(svg)));
      root.dataset.charts = charts.length;
    };
    find();
    document.addEventListener("renewed", find);
  };
  document.addEventListener("DOMContentLoaded", start);
})();
