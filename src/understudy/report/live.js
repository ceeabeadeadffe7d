"use strict";
// Renews the parts of an open report that have changed, and leaves what its reader does: place, focus, open details.
(() => {
  const EVERY_MS = 2000;
  const FOCUSABLE = "a[href], button, input, select, summary, [tabindex]";
  const root = document.documentElement;
  let digests = {}, updates = 0;

  // whoever reads a value, selects text or types goes on; the part is renewed afterwards
  const isBusy = (part) => {
    const selection = document.getSelection(), active = document.activeElement;
    return part.querySelector(".readout.live") !== null
      || (!selection.isCollapsed && selection.containsNode(part, true))
      || (part.contains(active) && ["INPUT", "SELECT", "TEXTAREA"].includes(active.tagName));
  };

  const renew = (part, html) => {
    const box = document.createElement("template");
    box.innerHTML = html;
    const fresh = box.content.firstElementChild;
    const open = [...part.querySelectorAll("details")].map((details) => details.open);
    const focused = [...part.querySelectorAll(FOCUSABLE)].indexOf(document.activeElement);
    part.replaceWith(fresh);
    // scripts make elements of their own first
    document.dispatchEvent(new CustomEvent("renewed", { detail: fresh }));
    fresh.querySelectorAll("details").forEach((details, at) => { if (open[at]) details.open = true; });
    if (focused >= 0) fresh.querySelectorAll(FOCUSABLE)[focused]?.focus({ preventScroll: true });
  };

  const update = (changed) => {
    const parts = [...document.querySelectorAll("main > header, main > section")];
    // the first part in view stays where it is
    const kept = parts.find((part) => part.getBoundingClientRect().bottom > 0);
    const top = kept?.getBoundingClientRect().top;
    for (const [name, { digest, html }] of Object.entries(changed)) {
      const part = document.getElementById(name);
      if (part === null || isBusy(part)) continue;
      renew(part, html);
      digests[name] = digest;
      updates += 1;
    }
    const now = kept && document.getElementById(kept.id)?.getBoundingClientRect().top;
    if (now !== undefined && now !== null && kept !== parts[0]) window.scrollBy(0, now - top);
    root.dataset.updates = updates;
  };

  const poll = async () => {
    const status = document.getElementById("live");
    if (!document.hidden) {
      try {
        const reply = await fetch(`parts?${new URLSearchParams(digests)}`, { cache: "no-store" });
        if (reply.ok) {
          update(await reply.json());
          status.textContent = `Live: up to date at ${new Date().toLocaleTimeString()}`;
        } else {
          status.textContent = await reply.text();
        }
      } catch {
        status.textContent = "Not connected: understudy watch has ended. The page is as it was then.";
      }
    }
    setTimeout(poll, EVERY_MS);
  };
  document.addEventListener("DOMContentLoaded", () => {
    digests = JSON.parse(document.getElementById("live").dataset.digests);
    setTimeout(poll, EVERY_MS);
  });
})();
