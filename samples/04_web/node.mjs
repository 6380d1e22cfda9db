// Opens a bundle in Node, from a folder.
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import ort from 'onnxruntime-node';
import { Decoder, describe } from './decode.mjs';
import { textOf } from './text.mjs';

/** `{decoder, text}` of the bundle in `folder`; ONNX Runtime maps its weights into memory by itself. */
export async function openFolder(folder) {
  const readJson = async (name) => JSON.parse(await readFile(join(folder, name), 'utf8'));
  const bundle = await describe(readJson);
  const session = await ort.InferenceSession.create(join(folder, bundle.graph), bundle.sessionOptions);
  return { decoder: new Decoder(ort, session, bundle), text: await textOf(bundle, readJson) };
}
