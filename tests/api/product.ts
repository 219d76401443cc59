// A client of the product service, by nothing but its OpenAPI document: registers, imports, changes stock, reads it back.
// It is compiled and never run: what it shows is that the types that other teams generate can be written with.
import type { components, operations } from './openapi.js';

type Product = components['schemas']['Register'];
type ImportQuery = NonNullable<operations['importProducts']['parameters']['query']>;
type Line = operations['importProducts']['responses'][200]['content']['application/x-ndjson'];
type Problem = components['schemas']['Problem'];
type Written = operations['setQuantity']['responses'][200]['content']['application/json'];

const base = 'http://localhost:8080';
const headers = { Authorization: 'Bearer …', 'Content-Type': 'application/json' };

async function call<T>(method: string, path: string, body: unknown): Promise<T> {
  const answer = await fetch(`${base}${path}`, { method, headers, body: JSON.stringify(body) });
  if (answer.ok) return (await answer.json()) as T;
  const problem = (await answer.json()) as Problem;
  throw new Error(`${problem.title} (${problem.status}): ${problem.detail ?? problem.type}`);
}

// What has a default may be left out.
const lamp: Product = { sku: 'LMP-1', name: 'Lamp', category: null };
await call('POST', '/v1/products', lamp);

// Every value of the enumeration can be sent, and nothing else.
const policies: NonNullable<ImportQuery['policy']>[] = ['goodRows', 'allOrNothing'];
// @ts-expect-error: there is no such policy
policies.push('someRows');
const query: ImportQuery = { dryRun: true, policy: 'allOrNothing', reason: 'spring catalogue' };
const parameters = new URLSearchParams(Object.entries(query).map(([name, value]) => [name, String(value)]));
const imported = await fetch(`${base}/v1/products:import?${parameters}`, {
  method: 'POST',
  headers: { ...headers, 'Content-Type': 'text/csv' },
  body: 'sku,name,quantity\nLMP-1,Lamp,3\n',
});
for (const text of (await imported.text()).trimEnd().split('\n')) {
  const line = JSON.parse(text) as Line;
  if ('summary' in line) console.log(line.summary.registered + line.summary.revised, line.summary.complete);
  else if (line.status === 'refused') console.log(line.line, line.problem?.detail);
}

const count: components['schemas']['RecordCount'] = { quantity: 3, countedAt: '2026-01-31T09:30:00Z' };
await call('POST', `/v1/products/${crypto.randomUUID()}/inventory/counts`, count);
const set: components['schemas']['SetQuantity'] = { quantity: 40, expectedQuantity: 3, reason: 'stocktaking' };
const written = await call<Written>('PATCH', `/v1/products/${crypto.randomUUID()}/inventory`, set);
const after: number | null = written.quantity ?? null;
console.log(after, written.sequence);
