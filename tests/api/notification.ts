// A client of the notification service, by nothing but its OpenAPI document. Compiled, never run; see product.ts.
import type { operations } from './openapi-notification.js';

type List = operations['listNotifications'];
type Query = NonNullable<List['parameters']['query']>;
type Page = List['responses'][200]['content']['application/json'];

async function page(query: Query): Promise<Page> {
  const parameters = new URLSearchParams(Object.entries(query).map(([name, value]) => [name, String(value)]));
  return (await (await fetch(`http://localhost:8082/v1/notifications?${parameters}`)).json()) as Page;
}

let next: Query | undefined = { limit: 50 };
while (next !== undefined) {
  const { items, nextCursor }: Page = await page(next);
  for (const alert of items) console.log(alert.sku, alert.quantity + 0, alert.mail.state, alert.mail.sentAt?.length);
  next = nextCursor === null || nextCursor === undefined ? undefined : { limit: 50, cursor: nextCursor };
}
