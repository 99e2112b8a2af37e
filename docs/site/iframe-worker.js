/* Browsers start no worker from file://, but the search is a worker. There, its script runs in a hidden frame. */
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      this.inside = frame.contentWindow
      this.inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data: structuredClone(data) }))
      const loads = url => new Promise((loaded, error) => {
        const script = this.inside.document.createElement("script")
        Object.assign(script, { src: url, onload: loaded, onerror: error })
        this.inside.document.body.append(script)
      })
      this.inside.importScripts = (...urls) => Promise.all(urls.map(loads))
      this.ready = loads(url)
    }
    postMessage(data) {
      this.ready.then(() => this.inside.dispatchEvent(new MessageEvent("message", { data: structuredClone(data) })))
    }
    terminate() {}
  }
}
