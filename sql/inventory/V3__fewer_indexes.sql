-- An order's events stand together in the stream, so its movements are those right after its decision's sequence: the key
-- finds them. An index by random order ids was touched by every line, and most of what Postgres logs was pages of it.

DROP INDEX movements_order;
