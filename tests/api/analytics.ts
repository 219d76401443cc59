// A client of the analytics service, by nothing but its OpenAPI document. Compiled, never run; see product.ts.
import type { operations, paths } from './openapi-analytics.js';

type Path = keyof paths;
type Summary = operations['getSummary']['responses'][200]['content']['application/json'];
type Levels = operations['listStockLevels']['responses'][200]['content']['application/json'];
type LevelsQuery = NonNullable<operations['listStockLevels']['parameters']['query']>;

async function read<T>(path: Path, query: Record<string, string> = {}): Promise<T> {
  const answer = await fetch(`http://localhost:8081${String(path)}?${new URLSearchParams(query)}`);
  return (await answer.json()) as T;
}

const summary = await read<Summary>('/v1/analytics/summary');
const sequence: number = summary.sequence;
const query: LevelsQuery = { limit: 20 };
const levels = await read<Levels>('/v1/analytics/stock-levels', { limit: String(query.limit) });
for (const level of levels.items) console.log(level.sku, level.quantity + 1, sequence);
