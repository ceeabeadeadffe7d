// Browsers start no worker for a page that is opened from the disk: the search of the site runs in a hidden frame there.
if (location.protocol === "file:") {
  window.Worker = class {
    constructor(url) {
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      this.frame.srcdoc =
        '<script>postMessage = (data) => parent.postMessage(data, "*")</scr' + `ipt><script src="${url}"></scr` + "ipt>";
      this.loaded = new Promise((resolve) => this.frame.addEventListener("load", resolve));
      this.listener = (event) => event.source === this.frame.contentWindow && this.onmessage?.(event);
      addEventListener("message", this.listener);
      document.body.append(this.frame);
    }

    postMessage(data) {
      this.loaded.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data })));
    }

    terminate() {
      removeEventListener("message", this.listener);
      this.frame.remove();
    }
  };
}
