// Reads AsyncAPI documents with the official parser, and fails on whatever it finds in one: asyncapi.mjs FILE…
//
// `asyncapi-latest-version` is passed over: it asks for the newest version of AsyncAPI as soon as there is one, which would
// have this check fail without any change here. The version is raised on purpose.
import { readFile } from 'node:fs/promises';
import { Parser } from '@asyncapi/parser';

const passedOver = new Set(['asyncapi-latest-version']);
let found = 0;
for (const file of process.argv.slice(2)) {
  const { document, diagnostics } = await new Parser().parse(await readFile(file, 'utf8'), { source: file });
  for (const { code, message, path, range } of diagnostics) {
    if (passedOver.has(String(code))) continue;
    found += 1;
    console.error(`${file}:${range.start.line + 1}: ${code}: ${message} (${path.join('.')})`);
  }
  if (document === undefined) {
    found += 1;
    console.error(`${file}: it cannot be read`);
  } else {
    console.log(`${file}: ${document.allChannels().length} channels, ${document.allMessages().length} messages`);
  }
}
process.exitCode = found === 0 ? 0 : 1;
