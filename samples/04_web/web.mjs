// Opens a bundle in a browser, from a URL.
import * as ort from 'onnxruntime-web/wasm';
import { Decoder, describe } from './decode.mjs';
import { textOf } from './text.mjs';

/** `{decoder, text}` of the bundle whose files lie under `url`. */
export async function openUrl(url) {
  const readJson = async (name) => (await fetched(url, name)).json();
  const bundle = await describe(readJson);
  const readBytes = async (name) => {
    const bytes = new Uint8Array(await (await fetched(url, name)).arrayBuffer());
    if (bytes.length !== bundle.files[name].bytes) {
      throw new Error(`${url}/${name} has ${bytes.length} bytes, the manifest says ${bundle.files[name].bytes}`);
    }
    return bytes;
  };
  const [graph, weights] = await Promise.all([readBytes(bundle.graph), readBytes(bundle.weights)]);
  const externalData = [{ path: bundle.weights, data: weights }];
  const session = await ort.InferenceSession.create(graph, { ...bundle.sessionOptions, externalData });
  return { decoder: new Decoder(ort, session, bundle), text: await textOf(bundle, readJson) };
}

async function fetched(url, name) {
  const response = await fetch(`${url}/${name}`);
  if (!response.ok) throw new Error(`${url}/${name}: ${response.status} ${response.statusText}`);
  return response;
}
