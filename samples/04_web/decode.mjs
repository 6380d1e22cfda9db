// Greedy text generation with a bundle of qsparse-export: the one loop for Node (node.mjs) and the browser (web.mjs).
// `ort` is onnxruntime-node or onnxruntime-web, whose InferenceSession and Tensor are the same.

const SCHEMA = 1;
const PAST = 'past_key_values.';
const PRESENT = 'present.';

/**
 * What opening a bundle takes. `readJson(name)` gives a promise of the parsed file of that name in the bundle.
 *
 * Gives `graph` and `weights` (names of the ONNX file and of its external data), `files` (the manifest's: name to `{bytes,
 * sha256}`), `model` (the configuration), `dtype` of cache and logits, `sessionOptions` for InferenceSession.create.
 * Throws an Error for what no JavaScript runtime can run.
 */
export async function describe(readJson) {
  const manifest = await readJson('manifest.json');
  if (manifest.schema !== SCHEMA || manifest.kind !== 'decoder') {
    throw new Error(`manifest.json: schema ${manifest.schema}, kind ${manifest.kind}; expected schema ${SCHEMA}, kind decoder`);
  }
  if (manifest.native) {
    throw new Error(
      `the bundle was made for ${manifest.target.name}, with a kernel library, which ONNX Runtime cannot load from ` +
        'JavaScript: export it with --target web or --target node',
    );
  }
  const { decoder } = (await readJson('genai_config.json')).model;
  // ONNX Runtime's own settings, as it was verified with: among them that no product rounds its activations to 8 bits.
  const settings = Object.entries(decoder.session_options).filter(([name]) => name.startsWith('session.'));
  return {
    graph: decoder.filename,
    weights: `${decoder.filename}.data`,
    files: manifest.files,
    model: manifest.model,
    dtype: manifest.dtype,
    sessionOptions: { extra: Object.fromEntries(settings) },
  };
}

/** An open decoder; `session` is an InferenceSession of the bundle that `describe` described as `bundle`. */
export class Decoder {
  constructor(ort, session, bundle) {
    this.ort = ort;
    this.session = session;
    this.model = bundle.model;
    this.dtype = bundle.dtype;
    this.pasts = session.inputNames.filter((name) => name.startsWith(PAST));
  }

  /**
   * Yields up to `count` times `{token, logits}`: the greedy token behind `prompt` (an array of token ids) and what came of
   * it so far, and the logits that chose it, Float32Array [vocab]. Ends behind an end-of-text token unless `stopAtEos` is
   * false. Throws a RangeError for ids or lengths that the model does not have.
   */
  async *generate(prompt, count, { stopAtEos = true } = {}) {
    this.#check(prompt, count);
    let cache = this.#emptyCache();
    let feed = prompt;
    for (let length = prompt.length; length < prompt.length + count; length += feed.length) {
      const outputs = await this.session.run({ ...this.#inputs(feed, length), ...cache });
      cache = Object.fromEntries(this.pasts.map((name) => [name, outputs[PRESENT + name.slice(PAST.length)]]));
      const logits = lastRow(outputs.logits);
      const token = argmax(logits);
      yield { token, logits };
      if (stopAtEos && this.model.eos_token_ids.includes(token)) return;
      feed = [token];
    }
  }

  /** The inputs but for the cache: `ids` are the last of `length` tokens. */
  #inputs(ids, length) {
    const int64 = (values) => new this.ort.Tensor('int64', BigInt64Array.from(values, BigInt), [1, values.length]);
    const inputs = {
      input_ids: int64(ids),
      position_ids: int64(ids.map((_, i) => length - ids.length + i)),
      attention_mask: int64(new Array(length).fill(1)),
    };
    return Object.fromEntries(Object.entries(inputs).filter(([name]) => this.session.inputNames.includes(name)));
  }

  #emptyCache() {
    const { kv_heads: heads, head_dim: width } = this.model;
    const nothing = this.dtype === 'float16' ? new Uint16Array(0) : new Float32Array(0);
    return Object.fromEntries(
      this.pasts.map((name) => [name, new this.ort.Tensor(this.dtype, nothing, [1, heads, 0, width])]),
    );
  }

  #check(prompt, count) {
    const { vocab_size: vocabulary, max_positions: positions } = this.model;
    if (prompt.length === 0) throw new RangeError('the prompt is empty; expected at least one token');
    for (const id of prompt) {
      if (!Number.isInteger(id) || id < 0 || id >= vocabulary) {
        throw new RangeError(`token ${id}; expected 0 to ${vocabulary - 1}`);
      }
    }
    if (prompt.length + count > positions) {
      throw new RangeError(`${prompt.length} prompt tokens and ${count} new ones; the model has ${positions} positions`);
    }
  }
}

/** The logits of the last position of a tensor [1, S, vocab], as Float32Array [vocab]. */
function lastRow(tensor) {
  const row = tensor.data.subarray(tensor.data.length - tensor.dims[2]);
  // float16 comes as bits where JavaScript has no Float16Array yet (Node before 24).
  return row instanceof Uint16Array ? Float32Array.from(row, fromHalf) : Float32Array.from(row);
}

/** The number whose float16 bits are `bits`. */
function fromHalf(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 0x1f;
  const mantissa = bits & 0x3ff;
  if (exponent === 0x1f) return mantissa ? NaN : sign * Infinity;
  return sign * (exponent ? (1024 + mantissa) * 2 ** (exponent - 25) : mantissa * 2 ** -24);
}

/** Index of the largest value, the lowest on ties; throws where one is NaN. */
function argmax(values) {
  if (values.some(Number.isNaN)) throw new Error('the model computed NaN logits');
  return values.reduce((best, value, i) => (value > values[best] ? i : best), 0);
}
