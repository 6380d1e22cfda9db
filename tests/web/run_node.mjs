// node run_node.mjs JOBS: prints the traces of each `{bundle, prompts, count}` as JSON.
import { openFolder } from '../../samples/04_web/node.mjs';
import { trace } from './trace.mjs';

const results = [];
for (const { bundle, prompts, count } of JSON.parse(process.argv[2])) {
  results.push(await trace(await openFolder(bundle), prompts, count));
}
console.log(JSON.stringify(results));
