import { app } from "../../scripts/app.js";

// When an old workflow is opened, ComfyUI's editor offers to replace nodes of other packs by ours. Version 1.58 remembers
// what it draws by the graph's version, which replacing does not change: it draws the nodes that it took out once more,
// fails on them, and stops drawing. So the version changes here, before it draws again.
app.registerExtension({
  name: "svdq.redraw",
  nodeCreated(node) {
    queueMicrotask(() => node.graph?.incrementVersion?.());
  },
});
