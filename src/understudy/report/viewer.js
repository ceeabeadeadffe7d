"use strict";
// Shows kept tokens. Rows are made as they come into view, so a sample of 32,000 tokens opens at once. Every text is set as
// text, none as markup.
(() => {
  const ROW = 27, MARGIN = 12, MAX_PANES = 4, NUM_LARGEST = 8, PER_THOUSAND = /(logprob|entropy)$/;
  const RATIO_EDGES = [-3, -1, -0.3, -0.1, 0.1, 0.3, 1, 3], RATIO_BINS = ["n4", "n3", "n2", "n1", "z", "p1", "p2", "p3", "p4"];
  const NATS_EDGES = [0.1, 0.5, 1, 2], SHARE_EDGES = [0.02, 0.1, 0.3, 0.6], SIZE_BINS = ["z", "q1", "q2", "q3", "q4"];
  const KINDS = {
    sampled: "sampled by the student", prefix: "prefix, written by a teacher", given: "written by a teacher or from data",
    environment: "written by the environment",
  };

  const make = (tag, className, text) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const signed = (value) => (value > 0 ? "+" : value < 0 ? "\u2212" : "") + Math.abs(value).toFixed(2);
  const plain = (value) => String(Number(value.toPrecision(3))).replace("-", "\u2212");
  const percent = (logprob) => {
    const share = 100 * Math.exp(logprob);
    return share > 0 && share < 0.01 ? share.toExponential(1) + " %" : share.toFixed(share < 1 ? 3 : 1) + " %";
  };
  const shown = (text) => text.replace(/\n/g, "\u23ce").replace(/\t/g, "\u21e5").replace(/\r/g, "\u240d") || "\u2205";
  const width = (text) => {
    let cells = 0;
    for (const char of text) cells += char.codePointAt(0) > 0x2e7f ? 2 : 1;
    return cells;
  };
  const binOf = (value, edges, bins) => { let at = 0; while (at < edges.length && value > edges[at]) at += 1; return bins[at]; };

  const unpack = async (packed) => {
    const bytes = Uint8Array.from(atob(packed), (char) => char.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return JSON.parse(await new Response(stream).text());
  };

  // One sample with its numbers in nats; a number that is not known is null.
  const read = (data, heading, nats) => {
    const { columns, texts, ids, missing, prompt } = data, size = columns.id.length;
    const get = (name, at) => {
      const value = columns[name] ? columns[name][at] : null;
      return value === null || !PER_THOUSAND.test(name) ? value : value / 1000;
    };
    const ratio = (at) => {
      const teacher = get("teacher_logprob", at), student = get("student_logprob", at);
      return teacher === null || student === null || teacher <= -9999 ? null : teacher - student;
    };
    const measure = (name, at) => (name === "log_ratio" ? ratio(at) : get(name, at));
    // of the method's trust region, or where it has none by size
    const isOutlier = (at) => (columns.trusted ? get("trusted", at) === 0 : Math.abs(ratio(at)) > nats);
    const terms = Object.keys(columns).filter((name) => name.startsWith("loss/"));
    const isMasked = (at) => columns.kind[at] === "environment"
      || (terms.length > 0 && terms.every((name) => columns[name][at] === null));
    const text = (at) => texts[columns.id[at]];
    const largest = {};
    const sizes = (name) => {
      if (!largest[name]) {
        const known = [...Array(size).keys()].filter((at) => measure(name, at) !== null);
        known.sort((a, b) => Math.abs(measure(name, b)) - Math.abs(measure(name, a)) || a - b);
        largest[name] = known;
      }
      return largest[name];
    };
    return { heading, columns, texts, ids, missing, prompt, size, get, measure, terms, isMasked, isOutlier, text, sizes };
  };

  // Colours of a measure: a class for a value, and what the legend says of the classes.
  const scaleOf = (name, flags) => {
    if (name === "trusted" || flags[name]) return { of: (value) => (value ? "yes" : "no"), legend: [["no", flags[name] ? flags[name][0] : "no"], ["yes", flags[name] ? flags[name][1] : "yes"]] };
    const ranges = (edges, bins, unit) => bins.map((bin, at) => [bin,
      at === 0 ? `\u2264 ${plain(edges[0])}` : at === edges.length ? `> ${plain(edges[at - 1])}${unit}` : `to ${plain(edges[at])}`]);
    if (name === "log_ratio" || name.startsWith("loss/")) {
      return { of: (value) => binOf(value, RATIO_EDGES, RATIO_BINS), legend: ranges(RATIO_EDGES, RATIO_BINS, name === "log_ratio" ? " nats" : "") };
    }
    if (/entropy$/.test(name)) return { of: (value) => binOf(value, NATS_EDGES, SIZE_BINS), legend: ranges(NATS_EDGES, SIZE_BINS, " nats") };
    return {
      of: (value, most) => binOf(Math.abs(value) / (Math.abs(most) || 1), SHARE_EDGES, SIZE_BINS),
      legend: ranges(SHARE_EDGES, SIZE_BINS, " of the sample's largest"),
    };
  };

  // Returns what the reader has chosen, for the viewer that takes this one's place on a live page.
  let state = () => null, onResize = () => {};
  const start = () => {
    const before = state();
    const section = document.querySelector("#tokens");
    if (!section) return;
    const index = JSON.parse(section.dataset.index), packed = [...section.querySelectorAll("[data-packed]")];
    const panesBox = section.querySelector(".panes"), colour = section.querySelector("#token-colour");
    const search = section.querySelector("#token-search"), found = section.querySelector(".search-found");
    const legend = section.querySelector(".token-legend"), beside = section.querySelector("#token-beside");
    const cache = new Map(), panes = [];
    let charWidth = 8;

    const load = async (at) => {
      if (!cache.has(at)) cache.set(at, read(await unpack(packed[at].dataset.packed), index.samples[at], index.outlier_nats));
      return cache.get(at);
    };
    const scale = () => scaleOf(colour.value, index.flags);

    const drawLegend = () => {
      const marks = [["m-outlier", "outlier"], ["k-prefix", "prefix"], ["k-environment", "environment"], ["m-masked", "masked: no loss"]];
      legend.replaceChildren(
        ...scale().legend.map(([bin, text]) => { const item = make("li"); item.append(make("span", `t ${bin}`, "abc"), text); return item; }),
        ...marks.map(([mark, text]) => { const item = make("li"); item.append(make("span", `t ${mark}`, "abc"), text); return item; }),
      );
    };

    const makePane = () => {
      const root = make("div", "pane"), head = make("div", "pane-head"), prompt = make("select"), step = make("select");
      const close = make("button", "quiet-button", "Close"), facts = make("p", "facts"), asked = make("details");
      const askedText = make("pre", "prompt"), view = make("div", "token-view"), inner = make("div", "token-rows");
      const largest = make("ol", "largest"), detail = make("div", "token-detail");
      const pane = { root, sample: null, at: 0, pinned: 0, rows: [], made: new Map(), hits: [], offsets: null };
      prompt.setAttribute("aria-label", "Prompt");
      step.setAttribute("aria-label", "Step");
      close.type = "button";
      asked.append(make("summary", "", "Prompt"), askedText);
      head.append(prompt, step, close);
      view.tabIndex = 0;
      view.setAttribute("role", "listbox");
      view.setAttribute("aria-label", "Tokens of the response. Arrow keys move; n and p go to the next and the previous largest difference.");
      view.append(inner);
      root.append(head, facts, asked, view, detail, make("h4", "", "Largest"), largest);

      const layOut = () => {
        const cells = Math.max(8, Math.floor((view.clientWidth - 26) / charWidth)), starts = [];
        let used = 0;
        pane.cells = cells;
        for (let at = 0; at < pane.sample.size; at += 1) {
          const need = Math.min(cells, width(shown(pane.sample.text(at))));
          if (at === 0 || used + need > cells || pane.sample.text(at - 1).endsWith("\n")) { starts.push(at); used = 0; }
          used += need;
        }
        pane.rows = starts;
        inner.style.height = `${starts.length * ROW}px`;
        view.style.height = `${Math.min(420, Math.max(3, starts.length) * ROW + 14)}px`;
        clear();
      };
      const rowOf = (at) => { let low = 0, high = pane.rows.length; while (high - low > 1) { const middle = (low + high) >> 1; if (pane.rows[middle] <= at) low = middle; else high = middle; } return low; };
      const clear = () => { pane.made.forEach((row) => row.remove()); pane.made.clear(); draw(); };
      const makeToken = (at, colours, most) => {
        const { sample } = pane, kind = sample.columns.kind[at], value = sample.measure(colour.value, at);
        const classes = ["t", `k-${kind}`];
        if (value !== null) classes.push(colours.of(value, most));
        if (sample.isOutlier(at)) classes.push("m-outlier");
        if (sample.isMasked(at)) classes.push("m-masked");
        if (pane.hits.some(([from, to]) => from <= at && at <= to)) classes.push("m-hit");
        const token = make("span", classes.join(" "), shown(sample.text(at)));
        token.dataset.at = at;
        token.id = `pane-${panes.indexOf(pane)}-${at}`;
        token.setAttribute("role", "option");
        return token;
      };
      const draw = () => {
        if (!pane.sample) return;
        const first = Math.max(0, Math.floor(view.scrollTop / ROW) - MARGIN);
        const last = Math.min(pane.rows.length - 1, Math.ceil((view.scrollTop + view.clientHeight) / ROW) + MARGIN);
        pane.made.forEach((row, at) => { if (at < first || at > last) { row.remove(); pane.made.delete(at); } });
        const colours = scale(), order = pane.sample.sizes(colour.value);
        const most = order.length ? pane.sample.measure(colour.value, order[0]) : 1;
        for (let at = first; at <= last; at += 1) {
          if (pane.made.has(at)) continue;
          const row = make("div", "token-row"), end = at + 1 < pane.rows.length ? pane.rows[at + 1] : pane.sample.size;
          row.style.top = `${at * ROW}px`;
          for (let token = pane.rows[at]; token < end; token += 1) row.append(makeToken(token, colours, most));
          pane.made.set(at, row);
          inner.append(row);
        }
        mark();
      };
      const mark = () => {
        inner.querySelectorAll(".now").forEach((token) => { token.classList.remove("now"); token.removeAttribute("aria-selected"); });
        const token = inner.querySelector(`[data-at="${pane.at}"]`);
        if (!token) return;
        token.classList.add("now");
        token.setAttribute("aria-selected", "true");
        view.setAttribute("aria-activedescendant", token.id);
      };
      const show = (at) => { pane.at = at; mark(); describe(pane, detail); };
      const go = (at) => {
        if (!pane.sample || !pane.sample.size) return;
        pane.pinned = Math.min(pane.sample.size - 1, Math.max(0, at));
        const top = rowOf(pane.pinned) * ROW;
        if (top < view.scrollTop || top + ROW > view.scrollTop + view.clientHeight) view.scrollTop = top - view.clientHeight / 2;
        draw();
        show(pane.pinned);
      };
      const jump = (by) => {
        const order = pane.sample.sizes(colour.value), now = order.indexOf(pane.pinned);
        if (order.length) go(order[(now + by + order.length + (now < 0 && by < 0 ? 1 : 0)) % order.length]);
      };
      const drawLargest = () => {
        const order = pane.sample.sizes(colour.value).slice(0, NUM_LARGEST);
        largest.replaceChildren(...order.map((at) => {
          const item = make("li"), button = make("button", "", `${shown(pane.sample.text(at))}  ${signed(pane.sample.measure(colour.value, at))}`);
          button.type = "button";
          button.addEventListener("click", () => { go(at); view.focus({ preventScroll: true }); });
          item.append(button);
          return item;
        }));
        if (!order.length) largest.replaceChildren(make("li", "quiet", pane.sample.missing.teacher_logprob || "no token has this number"));
      };
      const find = () => {
        const wanted = search.value.toLowerCase();
        pane.hits = [];
        if (pane.sample && wanted) {
          if (!pane.sample.offsets) {
            // a letter may have another length in lower case
            const texts = Array.from({ length: pane.sample.size }, (_, at) => pane.sample.text(at).toLowerCase());
            let length = 0;
            pane.sample.offsets = texts.map((text) => { const from = length; length += text.length; return from; });
            pane.sample.whole = texts.join("");
          }
          const { offsets, whole } = pane.sample;
          const tokenAt = (char) => { let low = 0, high = offsets.length; while (high - low > 1) { const middle = (low + high) >> 1; if (offsets[middle] <= char) low = middle; else high = middle; } return low; };
          for (let from = whole.indexOf(wanted); from >= 0 && pane.hits.length < 2000; from = whole.indexOf(wanted, from + 1)) {
            pane.hits.push([tokenAt(from), tokenAt(from + wanted.length - 1)]);
          }
        }
        return pane.hits.length;
      };
      const next = () => { const hit = pane.hits.find(([from]) => from > pane.pinned) || pane.hits[0]; if (hit) go(hit[0]); };

      // at the token `wanted`, or else at the largest difference
      const open = async (at, wanted) => {
        pane.index = at;
        const heading = index.samples[at];
        const named = [...new Map(index.samples.map((one) => [one.prompt_id, one])).keys()];
        prompt.replaceChildren(...named.map((name) => new Option(name, name, false, name === heading.prompt_id)));
        const same = index.samples.map((one, number) => [one, number]).filter(([one]) => one.prompt_id === heading.prompt_id);
        step.replaceChildren(...same.map(([one, number]) => new Option(
          `${one.run ? one.run + ", " : ""}step ${one.step.toLocaleString("en")}${one.index ? ", sample " + one.index : ""}`, number, false, number === at)));
        const sample = await load(at);
        if (pane.index !== at) return;
        pane.sample = sample;
        pane.at = pane.pinned = 0;
        askedText.textContent = sample.prompt;
        const left = heading.num_tokens - sample.size;
        facts.textContent = [heading.method, heading.teacher && `teacher ${heading.teacher}`, `${sample.size.toLocaleString("en")} tokens`,
          left > 0 && `${left.toLocaleString("en")} more are not kept`, heading.finish && `ended by ${heading.finish}`,
          heading.score !== undefined && `score ${plain(heading.score)}`].filter(Boolean).join(" \u00b7 ");
        view.scrollTop = 0;
        find();
        layOut();
        drawLargest();
        const order = sample.sizes(colour.value);
        go(wanted ?? (order.length ? order[0] : 0));
        section.dataset.opened = Number(section.dataset.opened || 0) + 1;
      };
      prompt.addEventListener("change", () => open(index.samples.findLastIndex((one) => one.prompt_id === prompt.value)));
      step.addEventListener("change", () => open(Number(step.value)));
      close.addEventListener("click", () => { panes.splice(panes.indexOf(pane), 1); root.remove(); changed(); });
      view.addEventListener("scroll", draw, { passive: true });
      const tokenOf = (event) => { const token = event.target.closest("[data-at]"); return token ? Number(token.dataset.at) : null; };
      view.addEventListener("pointerover", (event) => { const at = tokenOf(event); if (at !== null) show(at); });
      view.addEventListener("pointerleave", () => show(pane.pinned));
      view.addEventListener("click", (event) => { const at = tokenOf(event); if (at !== null) go(at); });
      view.addEventListener("keydown", (event) => {
        if (event.ctrlKey || event.metaKey || event.altKey || !pane.sample) return;
        const row = rowOf(pane.pinned), many = Math.max(1, Math.floor(view.clientHeight / ROW) - 1);
        const inRow = (to) => pane.rows[Math.min(pane.rows.length - 1, Math.max(0, to))] + (pane.pinned - pane.rows[row]);
        const moves = {
          ArrowRight: () => go(pane.pinned + 1), ArrowLeft: () => go(pane.pinned - 1), ArrowDown: () => go(inRow(row + 1)),
          ArrowUp: () => go(inRow(row - 1)), PageDown: () => go(inRow(row + many)), PageUp: () => go(inRow(row - many)),
          Home: () => go(0), End: () => go(pane.sample.size - 1), n: () => jump(1), p: () => jump(-1), "/": () => search.focus(),
        };
        if (!moves[event.key]) return;
        event.preventDefault();
        moves[event.key]();
      });
      Object.assign(pane, { open, clear, drawLargest, find, next, layOut, close, view });
      panes.push(pane);
      panesBox.append(root);
      changed();
      return pane;
    };

    const changed = () => {
      panes.forEach((pane) => { pane.close.hidden = panes.length < 2; });
      panesBox.dataset.panes = panes.length;
      beside.disabled = panes.length >= MAX_PANES;
      panes.forEach((pane) => { if (pane.sample) pane.layOut(); });
    };
    // the same prompt in another run, or at another step, that no pane shows, or else another sample
    const another = () => {
      const open = panes.map((pane) => pane.index), { prompt_id: name } = index.samples[open[0]];
      const runs = open.map((at) => index.samples[at].run), free = index.samples.map((_, at) => at).filter((at) => !open.includes(at));
      const same = free.filter((at) => index.samples[at].prompt_id === name);
      const others = same.filter((at) => !runs.includes(index.samples[at].run));
      return [others, same, free, open].find((some) => some.length).at(-1);
    };
    const searched = () => {
      const hits = panes.map((pane) => { const count = pane.find(); pane.clear(); return count; });
      found.textContent = search.value ? `${hits.join(" and ")} found` : "";
    };

    const probe = make("span", "t probe", "0".repeat(100));
    section.append(probe);
    charWidth = probe.getBoundingClientRect().width / 100 || 8;
    probe.remove();
    colour.replaceChildren(...Object.entries(index.measures).map(([name, label]) => new Option(label, name)));
    drawLegend();
    colour.addEventListener("change", () => { drawLegend(); panes.forEach((pane) => { if (pane.sample) { pane.clear(); pane.drawLargest(); } }); });
    search.addEventListener("input", searched);
    search.addEventListener("keydown", (event) => {
      if (event.key === "Escape") { search.value = ""; searched(); }
      if (event.key === "Enter") { event.preventDefault(); panes.forEach((pane) => pane.next()); }
    });
    beside.addEventListener("click", () => { const at = another(); makePane().open(at); });
    let last = 0;
    window.removeEventListener("resize", onResize);
    onResize = () => { if (panesBox.clientWidth !== last) { last = panesBox.clientWidth; changed(); } };
    window.addEventListener("resize", onResize);

    // at first the prompt that was kept most often: in two runs at its last steps, or in one at its first and last step
    const times = new Map();
    index.samples.forEach((one) => times.set(one.prompt_id, (times.get(one.prompt_id) || 0) + 1));
    const most = Math.max(...times.values()), name = [...times.keys()].findLast((one) => times.get(one) === most);
    const same = index.samples.map((_, at) => at).filter((at) => index.samples[at].prompt_id === name);
    const byRun = [...new Map(same.map((at) => [index.samples[at].run, at])).values()];
    const pair = byRun.length > 1 ? byRun.slice(0, 2) : [same[0], same[same.length - 1]];
    const chosen = same.length > 1 && panesBox.clientWidth > 760 ? pair : [same[same.length - 1]];
    const nameOf = (one) => JSON.stringify([one.run, one.step, one.prompt_id, one.index]);
    const kept = (before?.panes ?? []).map(({ name, at }) => [index.samples.findIndex((one) => nameOf(one) === name), at]);
    if (before) {
      search.value = before.search;
      if (before.colour in index.measures) colour.value = before.colour;
      drawLegend();
    }
    const opened = kept.some(([at]) => at >= 0) ? kept.filter(([at]) => at >= 0) : chosen.map((at) => [at]);
    Promise.all(opened.map(([at, token]) => makePane().open(at, token))).then(() => { if (search.value) searched(); });
    state = () => ({
      search: search.value, colour: colour.value,
      panes: panes.map((pane) => ({ name: nameOf(index.samples[pane.index]), at: pane.sample ? pane.pinned : undefined })),
    });
    section.dataset.samples = index.samples.length;

    // What is known of the token, and what the method did with it.
    const describe = (pane, box) => {
      const { sample, at } = pane, { columns } = sample, kind = columns.kind[at];
      const title = make("p", "token-title");
      title.append(make("code", "", JSON.stringify(sample.text(at))), ` token ${(at + 1).toLocaleString("en")} of ${sample.size.toLocaleString("en")}, id ${sample.ids[columns.id[at]]}, ${KINDS[kind] || kind}`);
      const table = make("table", "token-numbers"), body = make("tbody");
      table.append(body);
      const header = make("tr");
      header.append(make("td"), make("th", "", "student"), make("th", "", "teacher"));
      body.append(header);
      const rows = [
        ["probability", "logprob", (value) => (value <= -9999 ? "0, excluded" : percent(value))],
        ["log-probability", "logprob", (value) => (value <= -9999 ? "\u2212\u221e" : plain(value))], ["rank", "rank", String],
        ["entropy", "entropy", (value) => `${plain(value)} nats`],
      ];
      rows.forEach(([label, field, text]) => {
        const row = make("tr");
        row.append(make("th", "", label), ...["student", "teacher"].map((whose) => {
          const value = sample.get(`${whose}_${field}`, at);
          return value === null ? make("td", "absent", "not known") : make("td", "", text(value));
        }));
        body.append(row);
      });
      const likely = make("tr");
      likely.append(make("th", "", "most likely"), ...["student", "teacher"].map((whose) => {
        const cell = make("td"), top = columns[`${whose}_top`] && columns[`${whose}_top`][at];
        if (!top) { cell.className = "absent"; cell.textContent = "not known"; return cell; }
        const list = make("ol", "likely"), logprobs = columns[`${whose}_top_logprob`][at];
        top.forEach((token, place) => {
          const item = make("li", token === columns.id[at] ? "sampled" : "");
          item.append(make("code", "", JSON.stringify(sample.texts[token])), ` ${percent(logprobs[place] / 1000)}${token === columns.id[at] ? " \u25c2 this token" : ""}`);
          list.append(item);
        });
        cell.append(list);
        return cell;
      }));
      body.append(likely);
      const said = make("ul", "said"), say = (text) => said.append(make("li", "", text));
      const ratio = sample.measure("log_ratio", at);
      if (ratio !== null) {
        const times = Math.exp(Math.abs(ratio));
        say(`log T \u2212 log S ${signed(ratio)}: ${times < 1.005 ? "both find it equally likely" : `the teacher finds it ${times < 1000 ? plain(times) : times.toExponential(1)} times ${ratio > 0 ? "more" : "less"} likely`}`);
      }
      if (!columns.trusted && sample.isOutlier(at)) say(index.flags.outliers[1]);
      if (kind === "environment") say("not trained and not scored: the student did not write it");
      else {
        Object.keys(columns).forEach((name) => {
          const value = columns[name][at];
          if (name.startsWith("loss/")) say(value === null ? `no part in ${name.slice(5)}` : `${name.slice(5)}: loss ${plain(value)}`);
          else if (index.flags[name] && value !== null) say(`${name}: ${index.flags[name][value ? 1 : 0]}`);
          else if (value !== null && !/^(id|kind|gradient|push|.*(_top|_rank|logprob|entropy))$/.test(name)) say(`${name === "uniform" ? "random draw" : name} ${plain(value)}`);
        });
        const push = sample.get("push", at), gradient = sample.get("gradient", at), order = sample.sizes("gradient");
        if (push !== null && push !== 0) say(`the update makes it ${push > 0 ? "more" : "less"} likely`);
        if (gradient !== null && order.length) say(`its gradient is ${(100 * gradient / (sample.get("gradient", order[0]) || 1)).toFixed(0)} % of the sample's largest`);
        const names = { teacher_logprob: "the teacher's probability", teacher_entropy: "the teacher's entropy", teacher_rank: "the teacher's rank", teacher_top: "the teacher's most likely tokens" };
        Object.entries(sample.missing).forEach(([field, why]) => say(`${names[field] || field} is not known: ${why}`));
      }
      box.replaceChildren(title, table, said);
    };
  };
  document.addEventListener("DOMContentLoaded", start);
  document.addEventListener("renewed", (event) => { if (event.detail.id === "tokens") start(); });
})();
