// Text to token ids and back.
import { Tokenizer } from '@huggingface/tokenizers';

/** `{encode, decode}` of the bundle's tokenizer; where it has none, text is token ids: "1, 2, 3". */
export async function textOf(bundle, readJson) {
  if (!('tokenizer.json' in bundle.files)) return { encode: (text) => text.split(',').map(Number), decode: (ids) => ids.join(', ') };
  const tokenizer = new Tokenizer(await readJson('tokenizer.json'), await readJson('tokenizer_config.json'));
  const asItIs = { skip_special_tokens: true, clean_up_tokenization_spaces: false };
  return { encode: (text) => tokenizer.encode(text).ids, decode: (ids) => tokenizer.decode(ids, asItIs) };
}
