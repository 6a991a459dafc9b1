"use strict";
(() => {
  const $ = (selector, root = document) => root.querySelector(selector);
  const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
  const data = JSON.parse($("#data").textContent);
  const make = (name, text, attributes = {}) => {
    const element = document.createElement(name);
    if (text !== undefined) element.textContent = text;
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return element;
  };
  const size = (n) => {
    for (const [unit, name] of [[2 ** 40, "TiB"], [2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]])
      if (n >= unit) return `${(n / unit).toFixed(2)} ${name}`;
    return `${n} B`;
  };
  const loss = (x) => x === null ? "?" : x === 0 ? "0" : x >= 1e-4 && x < 1e4 ? String(Number(x.toPrecision(3))) : x.toExponential(2);
  $$("[hidden].scripted, .copy, .filters, #theme").forEach((element) => { element.hidden = false; });

  // Theme: the system's until another is chosen; a browser may refuse to remember it for files.
  const themes = ["auto", "light", "dark"];
  const store = (value) => {
    try { return value === undefined ? localStorage.getItem("requant-theme") : localStorage.setItem("requant-theme", value); }
    catch { return null; }
  };
  const wear = (theme) => {
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    $("#theme").textContent = `theme: ${theme}`;
  };
  let theme = themes.includes(store()) ? store() : "auto";
  wear(theme);
  $("#theme").addEventListener("click", () => {
    theme = themes[(themes.indexOf(theme) + 1) % themes.length];
    wear(theme);
    store(theme);
  });

  // Tooltip: what a title says, at once, for the keyboard too, and where titles are not shown.
  const tip = $("#tip");
  let shown = null;
  const show = (text, element) => {
    shown = element;
    tip.textContent = text;
    tip.hidden = false;
    const box = element.getBoundingClientRect();
    const { width, height } = tip.getBoundingClientRect();
    const left = Math.min(Math.max(box.left + box.width / 2 - width / 2, 8), innerWidth - width - 8);
    const above = box.top - height - 8;
    tip.style.left = `${left}px`;
    tip.style.top = `${above > 4 ? above : box.bottom + 8}px`;
  };
  const hide = () => { tip.hidden = true; };
  const follow = () => { if (!tip.hidden) show(tip.textContent, shown); };
  for (const element of $$("[title]")) {
    element.dataset.tip = element.title;
    if (element.tagName === "TD") element.setAttribute("aria-label", element.title.replaceAll("\n", ", "));
    element.removeAttribute("title");
  }
  for (const title of $$("svg title")) {
    const owner = title.parentElement;
    owner.setAttribute("aria-label", title.textContent);
    if (owner.tagName !== "svg") owner.dataset.tip = title.textContent;
    title.remove();
  }
  for (const dot of $$(".dots circle")) {
    const t = data.tensors[dot.dataset.i];
    dot.dataset.tip = `${t.name}\n${t.type}\npredicted error ${t.error.toFixed(4)}, measured ${t.measured.toFixed(4)}`;
  }
  const tipped = (event) => event.target.closest && event.target.closest("[data-tip]");
  for (const kind of ["pointerover", "focusin"])
    document.addEventListener(kind, (event) => {
      const element = tipped(event);
      if (element) show(element.dataset.tip, element);
      else if (kind === "pointerover") hide();
    });
  document.addEventListener("focusout", hide);
  addEventListener("scroll", follow, { passive: true, capture: true });
  addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });

  // The curve: the nearest of its points.
  for (const chart of $$(".curve")) {
    const [x0, x1, left, right] = chart.dataset.x.split(" ").map(Number);
    const [y0, y1, bottom, top] = chart.dataset.y.split(" ").map(Number);
    const cursor = $(".cursor", chart);
    chart.addEventListener("pointermove", (event) => {
      if (tipped(event) || !data.curve.length) return cursor.setAttribute("visibility", "hidden");
      const box = chart.getBoundingClientRect();
      const x = (event.clientX - box.left) * chart.viewBox.baseVal.width / box.width;
      const at = x0 + (x - left) / (right - left) * (x1 - x0);
      const inside = data.curve.filter(([n, l]) => n >= x0 && n <= x1 && l >= y0 && l <= y1);
      if (!inside.length || x < left || x > right) return;
      const [n, l] = inside.reduce((a, b) => Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a);
      cursor.setAttribute("cx", left + (n - x0) / (x1 - x0) * (right - left));
      cursor.setAttribute("cy", bottom + Math.log(l / y0) / Math.log(y1 / y0) * (top - bottom));
      cursor.setAttribute("visibility", "visible");
      show(`the best of its size\n${size(n)}, predicted loss ${loss(l)}`, cursor);
    });
    chart.addEventListener("pointerleave", () => { cursor.setAttribute("visibility", "hidden"); hide(); });
  }

  // The map: a grid of which one cell is in the order of the tab key, as ARIA's practices have it.
  const dialog = $("#candidates");
  const bytes = (type, weights) => weights / data.types[type][0] * data.types[type][1];
  const row = (name, cells, kind) => {
    const line = make("tr");
    cells.forEach((cell, i) => line.append(make(name === "th" || i === 0 ? "th" : "td", cell, {
      ...(i ? { class: "num" } : {}), ...(name === "th" ? { scope: "col" } : i ? {} : { scope: "row" }),
    })));
    if (kind) line.className = kind;
    return line;
  };
  const candidates = (t) => {
    const part = document.createDocumentFragment();
    part.append(make("h3", t.name), make("p", `${t.weights.toLocaleString("en")} weights, in the source ${t.source}`, { class: "hint" }));
    const found = Object.entries(t.candidates).sort((a, b) => bytes(a[0], t.weights) - bytes(b[0], t.weights) || b[1] - a[1]);
    if (!found.length) { part.append(make("p", `It is ${t.type}; no other type was scored.`)); return part; }
    const table = make("table", undefined, { class: "data" });
    const head = make("thead"), body = make("tbody");
    head.append(row("th", ["type", "bpw", "size", "predicted loss", "difference"]));
    for (const [type, harm] of found) {
      const n = bytes(type, t.weights), chosen = type === t.type;
      const change = chosen ? "" : n === t.bytes ? "none" : `${n < t.bytes ? "\u2212" : "+"}${size(Math.abs(n - t.bytes))}`;
      body.append(row("td", [chosen ? `\u25c6 ${type}, chosen` : type, (8 * n / t.weights).toFixed(2), size(n), loss(harm), change], chosen ? "chosen-row" : ""));
    }
    table.append(head, body);
    const scroll = make("div", undefined, { class: "scroll" });
    scroll.append(table);
    part.append(scroll);
    return part;
  };
  const open = (cell) => {
    const tensors = cell.dataset.i.split(" ").map((i) => data.tensors[i]);
    const { role, layer } = tensors[0];
    $("#candidates-title").textContent = layer === null ? role : `Layer ${layer}, ${role}`;
    $("#candidates-body").replaceChildren(...tensors.map(candidates));
    hide();
    dialog.showModal();
  };
  $("#close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  for (const table of $$(".heat")) {
    table.setAttribute("role", "grid");
    const cells = $$("td[data-i]", table);
    cells.forEach((cell, i) => cell.setAttribute("tabindex", i ? -1 : 0));
    const move = (from, to) => {
      from.tabIndex = -1;
      to.tabIndex = 0;
      to.focus();
    };
    table.addEventListener("click", (event) => {
      const cell = event.target.closest("td[data-i]");
      if (!cell) return;
      move($("td[tabindex='0']", table), cell);
      open(cell);
    });
    table.addEventListener("keydown", (event) => {
      const cell = event.target.closest("td[data-i]");
      if (!cell) return;
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); return open(cell); }
      const line = $$("td[data-i]", cell.parentElement), at = line.indexOf(cell);
      const beside = (name) => {
        let next = cell.parentElement[name];
        while (next && !next.children[cell.cellIndex]?.dataset.i) next = next[name];
        return next && next.children[cell.cellIndex];
      };
      const to = {
        ArrowLeft: line[at - 1], ArrowRight: line[at + 1], Home: line[0], End: line[line.length - 1],
        ArrowUp: beside("previousElementSibling"), ArrowDown: beside("nextElementSibling"),
      }[event.key];
      if (!to) return;
      event.preventDefault();
      move(cell, to);
    });
  }

  // The table: sorted by the exact figures, filtered by name, type and role.
  const table = $("#tensors"), body = table.tBodies[0];
  const rows = [...body.rows];
  const exact = { 2: "layer", 6: "bytes", 9: "loss", 10: "error", 11: "measured" };
  const key = (i, column) => {
    const t = data.tensors[i];
    if (column === 7) return t.bytes / t.weights;
    return exact[column] ? t[exact[column]] : rows[i].cells[column].textContent;
  };
  const order = (column, down) => {
    const keys = rows.map((_, i) => key(i, column));
    const compare = (a, b) => typeof keys[a] === "number" && typeof keys[b] === "number" ? keys[a] - keys[b] : String(keys[a]).localeCompare(String(keys[b]), "en", { numeric: true });
    const known = (k) => k !== null && k !== "";
    return rows.map((_, i) => i).sort((a, b) =>
      known(keys[b]) - known(keys[a]) || (known(keys[a]) ? (down ? compare(b, a) : compare(a, b)) : 0) || a - b);
  };
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = make("button", head.textContent, { type: "button" });
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const next = { ascending: "descending", descending: null }[head.getAttribute("aria-sort")];
      const sort = next === undefined ? "ascending" : next;
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      if (sort) head.setAttribute("aria-sort", sort);
      body.append(...(sort ? order(column, sort === "descending") : rows.map((_, i) => i)).map((i) => rows[i]));
    });
  });
  const name = $("#of-name"), type = $("#of-type"), role = $("#of-role");
  const filter = () => {
    const part = name.value.trim().toLowerCase();
    let n = 0, total = 0;
    rows.forEach((line, i) => {
      const t = data.tensors[i];
      const kept = t.name.toLowerCase().includes(part) && (!type.value || t.type === type.value) && (!role.value || t.role === role.value);
      line.hidden = !kept;
      if (kept) { n += 1; total += t.bytes; }
    });
    $("#count").textContent = `${n} of ${rows.length} tensors, ${size(total)}`;
  };
  for (const field of [name, type, role]) field.addEventListener("input", filter);
  filter();

  // Copying: what files may not always do through the clipboard's own interface is done with a selection.
  const selected = (code) => {
    const range = document.createRange();
    range.selectNodeContents(code);
    const selection = getSelection();
    selection.removeAllRanges();
    selection.addRange(range);
    try { return document.execCommand("copy"); } catch { return false; }
  };
  for (const button of $$(".copy"))
    button.addEventListener("click", async () => {
      const code = $("code", button.parentElement);
      let done = true;
      try { await navigator.clipboard.writeText(code.textContent); }
      catch { done = selected(code); }
      button.textContent = done ? "copied" : "selected";
      setTimeout(() => { button.textContent = "copy"; }, 2000);
    });
})();
