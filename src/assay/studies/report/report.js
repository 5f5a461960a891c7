/* Adds to charts that are already drawn: the value under the pointer, the same by keyboard, copying, the theme. */
(() => {
  "use strict";
  const one = (selector, root = document) => root.querySelector(selector);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const items = new Map(JSON.parse(one("#data").textContent).map((item) => [item.id, item]));
  const root = document.documentElement;
  const tip = one("#tip");
  const say = one("#say");

  // --- numbers, as the page itself writes them ---------------------------------------------------------------------
  const dress = (text) => text.replaceAll("-", "\u2212");
  const exponent = (value, digits) => dress(value.toExponential(digits).replace("+", "").replace(/\.?0+e/, "e"));
  function number(value, places) {
    if (value === null || value === undefined) return "not measured";
    if (value !== 0 && Math.abs(value) < 1e-4) return exponent(value, 1);
    if (value === 0 && places >= 5) return "0";
    if (value !== 0 && Math.abs(value) < 0.5 * 10 ** -places) return dress(value.toPrecision(2).replace(/\.?0+$/, ""));
    if (Math.abs(value) >= 1e7) return exponent(value, 3);
    return dress(value.toLocaleString("en-US", { minimumFractionDigits: places, maximumFractionDigits: places }));
  }
  function pixel(scale, value) {
    let [low, high] = scale.d;
    if (scale.log) [low, high, value] = [Math.log(low), Math.log(high), Math.log(value)];
    return high === low ? scale.r[0] : scale.r[0] + ((value - low) / (high - low)) * (scale.r[1] - scale.r[0]);
  }
  const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

  // --- drawing over a chart ----------------------------------------------------------------------------------------
  function shape(layer, name, attributes) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    layer.append(node);
    return node;
  }
  const box = (layer, style, x, y, width, height) => shape(layer, "rect", { class: style, x, y, width, height });
  const spot = (layer, x, y, style) => shape(layer, "circle", { class: `spot ${style || ""}`, cx: x, cy: y, r: 4.5 });

  /* Each kind of chart answers: how many places there are, which one is at a point, where a key leads, what to mark,
     what to say, and the box that the tooltip stands beside. */
  const kinds = {
    heat(item, plot) {
      const { at: [left, top, w, h], labels: [rows, columns], dp, key } = item.geometry;
      const [rowTitle, columnTitle, unit] = item.titles;
      const n = columns.length;
      const value = (i) => item.rows[Math.floor(i / n)][(i % n) + 1];
      const place = (i) => [left + (i % n) * w, top + Math.floor(i / n) * h];
      let strongest = 0;
      for (let i = 0; i < rows.length * n; i += 1) {
        if (Math.abs(value(i) ?? 0) > Math.abs(value(strongest) ?? 0)) strongest = i;
      }
      return {
        n: rows.length * n,
        start: strongest,
        pick(x, y) {
          const [c, r] = [Math.floor((x - left) / w), Math.floor((y - top) / h)];
          return c >= 0 && c < n && r >= 0 && r < rows.length ? r * n + c : null;
        },
        step(i, key) {
          const [r, c] = [Math.floor(i / n), i % n];
          const moves = {
            ArrowLeft: [r, c - 1], ArrowRight: [r, c + 1], ArrowUp: [r - 1, c], ArrowDown: [r + 1, c],
            Home: [r, 0], End: [r, n - 1], PageUp: [0, c], PageDown: [rows.length - 1, c],
          };
          const [to, along] = moves[key];
          return clamp(to, 0, rows.length - 1) * n + clamp(along, 0, n - 1);
        },
        mark(i, layer, weak) {
          const [x, y] = place(i);
          if (!weak) {
            box(layer, "cross", left, y, w * n, h);
            box(layer, "cross", x, top, w, h * rows.length);
          }
          box(layer, "ring", x - 1, y - 1, w + 1, h + 1);
          box(layer, "cell", x - 1, y - 1, w + 1, h + 1);
          for (const [kind, index] of [["r", Math.floor(i / n)], ["c", i % n]]) {
            one(`text.${kind}[data-i="${index}"]`, plot)?.classList.add("lit");
          }
          if (value(i) !== null) {
            const at = pixel(key, value(i));
            shape(layer, "path", { class: "pin", d: `M${at} ${key.y - 1}l-4-6h8z` });
          }
        },
        tell(i) {
          const [row, column] = [rows[Math.floor(i / n)], columns[i % n]];
          const at = new Set(columns).size < n ? ` (${i % n})` : "";
          return [`${number(value(i), dp)} ${value(i) === null ? "" : unit}`, [[rowTitle, row], [columnTitle, column + at]]];
        },
        at: (i) => [...place(i), w, h],
      };
    },

    lines(item) {
      const { box: [, top, , height], xs, y, series, dp } = item.geometry;
      return {
        n: xs.length,
        start: 0,
        pick(px) {
          let best = 0;
          xs.forEach((x, i) => { if (Math.abs(x - px) < Math.abs(xs[best] - px)) best = i; });
          return xs.length ? best : null;
        },
        step: along(xs.length),
        mark(i, layer) {
          shape(layer, "path", { class: "rule", d: `M${xs[i]} ${top}v${height}` });
          for (const line of series) {
            const value = item.rows[i][line.at];
            if (value !== null) spot(layer, xs[i], pixel(y, value), line.q);
          }
        },
        tell(i) {
          const facts = series.map((line) => {
            const row = item.rows[i];
            const band = line.band && row[line.at + 1] !== null;
            const ends = band ? ` (${number(row[line.at + 1], dp)} to ${number(row[line.at + 2], dp)})` : "";
            return [line.name, number(row[line.at], dp) + ends];
          });
          const x = item.rows[i][0];
          return [`${item.columns[0]} ${typeof x === "number" ? dress(String(x)) : x}`, facts];
        },
        at: (i) => [xs[i] - 6, top + height * 0.25, 12, height * 0.3],
      };
    },

    bars(item) {
      const { box: [left, , width], bands, x, labels, at, dp } = item.geometry;
      return {
        n: bands.length,
        start: 0,
        pick(px, py) {
          const found = bands.findIndex(([y, h]) => py >= y && py < y + h);
          return found < 0 ? null : found;
        },
        step: along(bands.length),
        mark(i, layer) {
          box(layer, "cross", 0, bands[i][0], left + width, bands[i][1]);
        },
        tell(i) {
          const row = item.rows[i];
          const facts = at === 2 ? [["group", row[0]]] : [];
          if (row.length > at + 1 && row[at + 1] !== null) {
            facts.push(["interval", `${number(row[at + 1], dp)} to ${number(row[at + 2], dp)}`]);
          }
          return [`${labels[i]}: ${number(row[at], dp)}`, facts];
        },
        at(i) {
          const end = pixel(x, item.rows[i][at] ?? 0);
          return [end - 4, bands[i][0], 8, bands[i][1]];
        },
      };
    },

    scatter(item) {
      const { x, y, dp } = item.geometry;
      const points = item.rows
        .map(([name, a, b]) => ({ name, a, b, x: a === null ? 0 : pixel(x, a), y: b === null ? 0 : pixel(y, b) }))
        .filter((point) => point.a !== null && point.b !== null)
        .sort((p, q) => p.a - q.a);
      return {
        n: points.length,
        start: 0,
        pick(px, py) {
          let best = null;
          let least = 18 ** 2;
          points.forEach((point, i) => {
            const far = (point.x - px) ** 2 + (point.y - py) ** 2;
            if (far < least) [best, least] = [i, far];
          });
          return best;
        },
        step: along(points.length),
        mark(i, layer) { spot(layer, points[i].x, points[i].y, "q1"); },
        tell(i) {
          const { name, a, b } = points[i];
          return [name, [[item.columns[1], number(a, dp[0])], [item.columns[2], number(b, dp[1])]]];
        },
        at: (i) => [points[i].x - 5, points[i].y - 5, 10, 10],
      };
    },

    dist(item) {
      const { box: [left, , width], x, rows, estimate, dp } = item.geometry;
      const cells = rows.flatMap((row) => row.bins.map(([low, high, count]) => ({ row, low, high, count })));
      const middle = (cell) => (pixel(x, cell.low) + pixel(x, cell.high)) / 2;
      return {
        n: cells.length,
        start: 0,
        pick(px, py) {
          let best = null;
          cells.forEach((cell, i) => {
            if (py < cell.row.y || py >= cell.row.y + cell.row.h) return;
            if (best === null || Math.abs(middle(cell) - px) < Math.abs(middle(cells[best]) - px)) best = i;
          });
          return best;
        },
        step: along(cells.length),
        mark(i, layer) {
          const { row, low, high } = cells[i];
          const [a, b] = [pixel(x, low), pixel(x, high)];
          box(layer, "cross", left, row.y, width, row.h);
          box(layer, "cell", a - 1, row.y + 20, Math.max(b - a, 1) + 1, row.h - 24);
        },
        tell(i) {
          const { row, low, high, count } = cells[i];
          const range = low === high ? number(low, dp) : `${number(low, dp)} to ${number(high, dp)}`;
          const facts = [[low === high ? "draw" : `${count} of ${row.n} draws`, range]];
          if (estimate !== null) facts.push(["estimate", number(estimate, dp)]);
          return [row.name, facts];
        },
        at: (i) => [middle(cells[i]) - 4, cells[i].row.y + 20, 8, cells[i].row.h - 24],
      };
    },

    tokens(item, plot) {
      const { labels, dp } = item.geometry;
      const words = all(".tok", plot);
      return {
        n: words.length,
        start: 0,
        html: true,
        pick: (x, y, target) => { const i = words.indexOf(target.closest?.(".tok")); return i < 0 ? null : i; },
        step: along(words.length),
        mark(i) { words[i].classList.add("lit"); },
        tell: (i) => [`${labels[i]}: ${number(item.rows[i][2], dp)}`, [["position", String(i)]]],
        at: (i) => words[i].getBoundingClientRect(),
      };
    },
  };

  function along(count) {
    const by = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1, PageUp: -10, PageDown: 10 };
    return (i, key) => (key === "Home" ? 0 : key === "End" ? count - 1 : clamp(i + by[key], 0, count - 1));
  }

  // --- one controller for all charts -------------------------------------------------------------------------------
  const KEYS = ["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Home", "End", "PageUp", "PageDown"];
  const charts = [];
  let shown = null;

  function live(plot) {
    const item = items.get(plot.dataset.chart);
    const make = item && item.geometry && kinds[item.geometry.k];
    if (!make) return;
    const chart = { ...make(item, plot), item, plot, svg: one("svg", plot), last: null };
    if (!chart.n) return;
    charts.push(chart);
    plot.dataset.live = "";
    if (chart.svg) chart.layer = shape(chart.svg, "g", { class: "over" });
    plot.addEventListener("pointermove", (event) => point(chart, event));
    plot.addEventListener("pointerdown", (event) => point(chart, event));
    plot.addEventListener("pointerleave", (event) => { if (event.pointerType !== "touch") hide(); });
    plot.addEventListener("scroll", moved);
    plot.addEventListener("focus", () => { if (plot.matches(":focus-visible")) show(chart, chart.last ?? chart.start, true); });
    plot.addEventListener("blur", hide);
    plot.addEventListener("keydown", (event) => key(chart, event));
  }

  function point(chart, event) {
    let [x, y] = [event.clientX, event.clientY];
    if (!chart.html) {
      const frame = chart.svg.getBoundingClientRect();
      const zoom = frame.width / chart.svg.viewBox.baseVal.width;
      [x, y] = [(x - frame.left) / zoom, (y - frame.top) / zoom];
    }
    const i = chart.pick(x, y, event.target);
    if (i === null) hide();
    else show(chart, i, false);
  }

  function key(chart, event) {
    if (event.ctrlKey || event.metaKey || event.altKey || !KEYS.includes(event.key)) return;
    event.preventDefault();
    const fresh = shown === null || shown.chart !== chart;
    show(chart, fresh ? chart.last ?? chart.start : chart.step(shown.i, event.key), true);
  }

  function show(chart, i, aloud) {
    if (shown && shown.chart === chart && shown.i === i && !aloud) return;
    hide();
    chart.mark(i, chart.layer, false);
    chart.last = i;
    shown = { chart, i, aloud };
    const lattice = chart.item.lattice;
    const twins = lattice ? charts.filter((c) => c !== chart && c.item.lattice === lattice && c.item.section === chart.item.section) : [];
    for (const twin of twins) twin.mark(i, twin.layer, true);
    const [head, facts] = chart.tell(i);
    const title = document.createElement("b");
    title.textContent = head.trim();
    const list = document.createElement("dl");
    for (const [name, value] of facts) {
      const [term, definition] = [document.createElement("dt"), document.createElement("dd")];
      [term.textContent, definition.textContent] = [name, value];
      list.append(term, definition);
    }
    tip.replaceChildren(title, list);
    tip.hidden = false;
    position(chart, i);
    if (aloud) say.textContent = [head.trim(), ...facts.map(([name, value]) => `${name} ${value}`)].join(", ");
  }

  function position(chart, i) {
    let frame = chart.at(i);
    if (!chart.html) {
      const [x, y, w, h] = frame;
      const outer = chart.svg.getBoundingClientRect();
      const zoom = outer.width / chart.svg.viewBox.baseVal.width;
      frame = { left: outer.left + x * zoom, top: outer.top + y * zoom, width: w * zoom, height: h * zoom };
    }
    const size = tip.getBoundingClientRect();
    const above = frame.top - size.height - 10;
    const top = above >= 8 ? above : frame.top + frame.height + 10;
    const left = frame.left + frame.width / 2 - size.width / 2;
    tip.style.left = `${clamp(left, 8, Math.max(8, root.clientWidth - size.width - 8))}px`;
    tip.style.top = `${clamp(top, 8, Math.max(8, window.innerHeight - size.height - 8))}px`;
  }

  function hide() {
    if (!shown) return;
    shown = null;
    tip.hidden = true;
    for (const chart of charts) chart.layer?.replaceChildren();
    for (const node of all(".lit")) node.classList.remove("lit");
  }

  /* Focus scrolls a chart into view: what the keyboard shows follows it, what the pointer showed is left behind. */
  function moved() {
    if (!shown) return;
    if (shown.aloud) position(shown.chart, shown.i);
    else hide();
  }

  all("[data-chart]").forEach(live);
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
  window.addEventListener("scroll", moved, { passive: true });

  // --- copying -----------------------------------------------------------------------------------------------------
  async function copy(text) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch (error) {
      const area = document.createElement("textarea");
      area.value = text;
      area.className = "sr";
      document.body.append(area);
      area.select();
      const done = document.execCommand("copy");
      area.remove();
      return done;
    }
  }
  const field = (value) => {
    const text = value === null ? "" : String(value);
    return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  const csv = ({ columns, rows }) => [columns, ...rows].map((row) => row.map(field).join(",")).join("\n") + "\n";
  document.addEventListener("click", async (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    const { python, csv: table, copy: source } = button.dataset;
    const text = python ? items.get(python).python : table ? csv(items.get(table)) : source && one(`#${source}`).textContent;
    if (!text) return;
    const done = await copy(text);
    button.focus();
    const before = (button.dataset.label ??= button.textContent);
    button.textContent = done ? "Copied" : "Copying is not allowed here";
    button.classList.toggle("done", done);
    say.textContent = button.textContent;
    setTimeout(() => { button.textContent = before; button.classList.remove("done"); }, 1600);
  });

  // --- theme and navigation ----------------------------------------------------------------------------------------
  const toggle = one("#theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  function label() {
    const other = dark() ? "Light" : "Dark";
    one("span", toggle).textContent = other;
    toggle.setAttribute("aria-label", `${other} theme`);
  }
  toggle.hidden = false;
  toggle.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    try { localStorage.setItem("assay-theme", root.dataset.theme); } catch (error) { /* the choice lasts for this page */ }
    label();
  });
  system.addEventListener("change", label);
  label();

  const links = new Map(all("nav a").map((link) => [link.hash.slice(1), link]));
  const seen = new Set();
  const watch = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) seen[isIntersecting ? "add" : "delete"](target.id);
    const current = [...links.keys()].find((id) => seen.has(id));
    if (!current) return;
    for (const [id, link] of links) {
      if (id === current) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
    }
  }, { rootMargin: "-15% 0px -70% 0px" });
  for (const id of links.keys()) watch.observe(document.getElementById(id));
})();
