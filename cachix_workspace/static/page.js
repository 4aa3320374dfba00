// Keeps a page up to date: one stream of changes for all tabs, and only what is marked `data-live`
// is drawn anew. Without it every page still reads and every form still works.
"use strict";
(() => {
  const body = document.body, root = document.documentElement;
  const byId = (id) => document.getElementById(id);
  root.classList.add("scripted");

  // --- drawing anew: elements stay the same ones, so that focus and selection survive ------------
  const sync = (old, fresh) => {
    for (const { name } of [...old.attributes]) {
      if (!fresh.hasAttribute(name) && !["open", "checked", "hidden", "style"].includes(name)) old.removeAttribute(name);
    }
    for (const { name, value } of fresh.attributes) {
      if (old.getAttribute(name) !== value && !["open", "checked", "value"].includes(name)) old.setAttribute(name, value);
    }
  };
  const morph = (old, fresh) => {
    if (old.isEqualNode(fresh)) return;
    sync(old, fresh);
    if ("rows" in old.dataset) return morphRows(old, fresh);
    const theirs = [...fresh.childNodes];
    theirs.forEach((node, index) => {
      const mine = old.childNodes[index];
      if (!mine) old.append(node);
      else if (mine.nodeType === 3 && node.nodeType === 3) { if (mine.data !== node.data) mine.data = node.data; }
      else if (mine.nodeName === node.nodeName && mine.nodeType === 1 && mine.id === node.id) morph(mine, node);
      else if (mine.contains(document.activeElement)) old.insertBefore(node, mine);
      else mine.replaceWith(node);
    });
    while (old.childNodes.length > theirs.length && !old.lastChild.contains(document.activeElement)) old.lastChild.remove();
  };
  const morphRows = (old, fresh) => { // no row moves: a new one comes last
    const mine = new Map([...old.children].map((row) => [row.dataset.key, row]));
    const theirs = [...fresh.children];
    for (const row of theirs) {
      const known = mine.get(row.dataset.key);
      if (known) morph(known, row); else old.append(row);
      mine.delete(row.dataset.key);
    }
    for (const row of mine.values()) if (!row.contains(document.activeElement)) row.remove();
    const order = theirs.map((row) => row.dataset.key), sort = byId("sort");
    if (!sort) return;
    const tails = []; // the longest run of rows that are in order: the others have moved
    for (const row of old.children) {
      const place = order.indexOf(row.dataset.key), index = tails.findIndex((tail) => tail > place);
      tails[index < 0 ? tails.length : index] = place;
    }
    const moved = old.children.length - tails.length;
    sort.hidden = !moved;
    sort.firstElementChild.textContent = `${moved} changed: sort again`;
  };

  let drawing = false, again = false;
  const draw = async () => {
    if (document.hidden) return; // it is drawn when it is seen again
    if (drawing) { again = true; return; }
    drawing = true;
    const start = performance.now();
    try {
      const options = { headers: { Accept: "text/html", "X-Live": "1" }, signal: AbortSignal.timeout(20000) };
      const answer = await fetch(body.dataset.live || location.href, options);
      if (answer.redirected || !answer.ok) { // signed out, or it is gone; a form is never sent again
        if (answer.status >= 500 || body.dataset.live) throw answer;
        location.reload();
        return;
      }
      const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
      for (const old of document.querySelectorAll("body [data-live]")) {
        const node = fresh.getElementById(old.id);
        if (node) morph(old, document.importNode(node, true));
      }
      document.title = fresh.title;
      byId("stream").hidden = true;
      showTimes();
    } catch { lost(); again = true; }
    setTimeout(() => { // a page that costs much is drawn less often
      drawing = false;
      if (again) { again = false; draw(); }
    }, Math.max(again ? 2000 : 500, 4 * (performance.now() - start)));
  };

  // --- the stream: the tab that holds the lock has it, and tells the others ----------------------
  const topics = new Set(body.dataset.topics.split(" ").filter(Boolean));
  const channel = "BroadcastChannel" in window ? new BroadcastChannel("feed") : null;
  let since = body.dataset.since, leave = null, source = null;
  const lost = (reason = "") => {
    const notice = byId("stream");
    if (!notice.hidden && !reason) return;
    notice.textContent = `${reason}Showing ${new Date().toTimeString().slice(0, 5)}, reconnecting …`;
    notice.hidden = false;
  };
  const heard = (message) => {
    if (message.lost !== undefined) { lost(message.lost); return; }
    if (message.asks) { // a new tab, which has missed what was told while it loaded
      if (source && Number(since) > Number(message.asks)) channel.postMessage({ id: since, topics: ["all"] });
      return;
    }
    byId("stream").hidden = true;
    if (message.id) since = message.id;
    const changed = message.topics || [];
    if (changed.includes("all") || changed.some((topic) => topics.has(topic))) draw();
    const logs = changed.filter((topic) => topic.startsWith("log:") || topic === "all");
    if (logs.length) document.dispatchEvent(new CustomEvent("log", { detail: logs }));
  };
  const tell = (message) => { heard(message); if (channel) channel.postMessage(message); };
  const follow = () => {
    source = new EventSource(`/events?since=${since}`);
    source.onopen = () => tell({ open: true });
    source.onerror = () => {
      tell({ lost: "" });
      if (source && source.readyState === 2) setTimeout(() => { if (leave) follow(); }, 3000);
    };
    source.addEventListener("restart", () => tell({ lost: "The workspace restarts. " }));
    source.onmessage = (event) => tell({ id: event.lastEventId, topics: JSON.parse(event.data) });
  };
  const hold = () => new Promise((resolve) => { leave = resolve; follow(); });
  const begin = () => {
    if (leave || document.hidden) return;
    const turn = new AbortController();
    leave = () => turn.abort();
    if (navigator.locks) navigator.locks.request("feed", { signal: turn.signal }, hold).catch(() => {});
    else hold();
  };
  const end = () => {
    if (source) source.close();
    if (leave) leave();
    source = leave = null;
  };
  if (channel) channel.onmessage = (event) => heard(event.data);
  if (topics.size) {
    begin();
    if (channel) channel.postMessage({ asks: since });
    document.addEventListener("visibilitychange", () => {
      if (document.hidden) end(); else { begin(); draw(); }
    });
    addEventListener("pagehide", end);
    addEventListener("pageshow", (event) => { if (event.persisted) { begin(); draw(); } });
  }

  // --- a log that grows: the reader who scrolled up stays where he is -----------------------------
  const log = byId("log");
  if (log) {
    const at = location.hash ? null : log.dataset.at && byId(log.dataset.at);
    if (at) { at.classList.add("at"); log.scrollTop = at.offsetTop - log.offsetTop - 60; }
    else if (log.dataset.log) log.scrollTop = log.scrollHeight;
    let reading = false, more = false;
    const grow = async () => {
      if (reading) { more = true; return; }
      reading = true;
      try {
        const answer = await fetch(`${log.dataset.url}?from=${log.dataset.next}`, { signal: AbortSignal.timeout(20000) });
        const fresh = new DOMParser().parseFromString(await answer.text(), "text/html").querySelectorAll(".line");
        const isAtEnd = log.scrollTop + log.clientHeight > log.scrollHeight - 40;
        if (fresh.length) log.querySelector(".log-empty")?.remove();
        log.append(...fresh);
        log.dataset.next = Number(log.dataset.next) + fresh.length;
        for (const id of ["log-end", "log-total"]) if (byId(id)) byId(id).textContent = log.dataset.next;
        if (isAtEnd) log.scrollTop = log.scrollHeight;
        if (fresh.length && "grows" in byId("how").dataset) draw(); // the log tells how much has come
        more = more || fresh.length >= 500;
      } catch { lost(); }
      reading = false;
      if (more) { more = false; setTimeout(grow, 300); }
    };
    if (log.dataset.log) {
      document.addEventListener("log", (event) => {
        if (event.detail.includes("all") || event.detail.includes(`log:${log.dataset.log}`)) grow();
      });
      document.addEventListener("visibilitychange", () => { if (!document.hidden) grow(); });
    }
  }

  // --- small things -----------------------------------------------------------------------------
  const UNITS = [[60, 1, "s"], [3600, 60, "min"], [86400, 3600, "h"], [2592000, 86400, "days"], [31536000, 2592000, "months"], [Infinity, 31536000, "years"]];
  const relative = (seconds) => {
    const span = Math.abs(seconds);
    if (span < 10) return "just now";
    const [, unit, word] = UNITS.find(([limit]) => span < limit);
    const count = Math.floor(span / unit);
    const words = `${count} ${count === 1 && word.length > 3 ? word.slice(0, -1) : word}`;
    return seconds < 0 ? `in ${words}` : `${words} ago`;
  };
  const showTimes = () => {
    for (const time of document.querySelectorAll("time[datetime]")) {
      const text = relative((Date.now() - Date.parse(time.dateTime)) / 1000);
      if (time.textContent !== text) time.textContent = text;
    }
  };
  setInterval(showTimes, 15000);
  document.addEventListener("click", async (event) => {
    const button = event.target.closest("[data-copy]");
    if (!button) return;
    const text = byId(button.dataset.copy).textContent;
    try { await navigator.clipboard.writeText(text); button.textContent = "Copied"; } catch {
      getSelection().selectAllChildren(byId(button.dataset.copy)); // plain http has no clipboard
      button.textContent = document.execCommand("copy") ? "Copied" : "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
  const picks = () => {
    const count = document.querySelectorAll("#select input[name=name]:checked").length;
    const bar = byId("bar");
    if (!bar) return;
    bar.classList.toggle("picked", count > 0); // it stays in view
    byId("picked").textContent = count ? `${count} selected:` : "Select agents to:";
    for (const button of bar.querySelectorAll("button")) button.disabled = !count;
  };
  if (byId("select")) { byId("select").addEventListener("change", picks); picks(); }
})();
