// Python in a worker of its own, so that the page stays alive while it computes, and can end it.
import { loadPyodide } from "./pyodide/pyodide.mjs";

async function load() {
  const here = new URL(".", import.meta.url);
  const archive = fetch(new URL("python.zip", here)).then((answer) => answer.arrayBuffer());
  const python = await loadPyodide({ indexURL: new URL("pyodide/", here).href });
  python.unpackArchive(await archive, "zip", { extractDir: "/play" });
  python.runPython("import sys; sys.path.insert(0, '/play')");
  return python.pyimport("play");
}

const loaded = load();
loaded.then(
  (play) => postMessage({ ready: JSON.parse(play.describe_json()) }),
  (error) => postMessage({ broken: String(error.message ?? error) }),
);

onmessage = async ({ data }) => {
  try {
    const play = await loaded;
    const began = performance.now();
    const text = play.run_json(JSON.stringify(data), (side, ended) => postMessage({ side, ended }));
    postMessage({ result: JSON.parse(text), seconds: (performance.now() - began) / 1000 });
  } catch (error) {
    postMessage({ broken: String(error.message ?? error) });
  }
};
