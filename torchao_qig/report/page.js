"use strict";
// Chooses which view of the token weights is shown. Without this script the page shows the first one, the mean over all groups.
(() => {
  const block = document.getElementById("weights");
  if (!block) return;
  const data = JSON.parse(block.textContent);
  const controls = document.querySelector(".controls");
  const kind = controls.querySelector("select");
  const layer = controls.querySelector("[name=layer]");
  const strength = controls.querySelector("[name=strength]");
  const told = controls.querySelector("output");
  const cards = [...document.querySelectorAll(".card")].map((card) => [...card.querySelectorAll(".token")]);
  const start = cards.map((tokens) => tokens.map((token) => token.title));

  function show(view) {
    document.documentElement.style.setProperty("--view", view);
    document.documentElement.dataset.view = view;
    cards.forEach((tokens, c) => {
      const bytes = atob(data.weights[c][view] || "");
      tokens.forEach((token, t) => {
        const log = (bytes.charCodeAt(t) / 127 - 1) * data.span;
        const last = data.colours.length - 1;
        const level = Math.round((Math.min(1, Math.max(-1, log / data.reach)) + 1) / 2 * last);
        token.style.background = view === 0 ? "" : data.colours[level]; // the first view's colour is its class's
        token.title = view === 0 ? start[c][t] : start[c][t].replace(/[^ ]*$/, (2 ** log).toFixed(2));
      });
    });
  }

  function choose() {
    const layers = data.views[kind.value];
    layer.max = layers.length - 1;
    layer.disabled = layers.length < 2;
    const [name, view] = layers[Math.min(layer.value, layers.length - 1)];
    told.textContent = name;
    show(view);
  }

  Object.keys(data.views).forEach((name) => kind.add(new Option(name === "all" ? "mean of all" : name, name)));
  kind.addEventListener("input", choose);
  layer.addEventListener("input", choose);
  strength.addEventListener("input", () => document.documentElement.style.setProperty("--strength", strength.value / 100));
  controls.hidden = false;
  choose();
})();
