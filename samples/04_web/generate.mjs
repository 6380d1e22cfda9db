// node generate.mjs BUNDLE PROMPT [TOKENS]: prints the greedy continuation of PROMPT.
import { openFolder } from './node.mjs';

const [folder, prompt, count = '48'] = process.argv.slice(2);
const { decoder, text } = await openFolder(folder);
const tokens = [];
for await (const { token } of decoder.generate(text.encode(prompt), Number(count))) tokens.push(token);
console.log(text.decode(tokens));
