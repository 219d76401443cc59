-- Tables and indexes for readers: lists with every filter and sort, history, stock at a past moment, counts.
--
-- Details and stock of a product become two tables. Stock changes with every order, and a row that changes gets a new
-- entry in each index of its table: apart, an order pays for the few indexes about stock and not for those about names.
--
-- What is new cannot be computed from the old rows (when a product was registered in the stream, its counts), so the
-- projection begins at 0 again: the projector fills it from the stream at once. `lomash rebuild` does so beside the live
-- tables instead.

UPDATE checkpoint SET sequence = 0, skipped = 0, updated_at = now();
TRUNCATE movements, order_decisions;
DROP TABLE products;

-- COLLATE "C": the same order on every server, whatever its locale, and the cheapest to compare.
CREATE TABLE products (
    product_id          uuid        PRIMARY KEY,
    sku                 text        COLLATE "C" NOT NULL,
    name                text        COLLATE "C" NOT NULL,
    category            text        COLLATE "C",
    active              boolean     NOT NULL,
    words               text[]      NOT NULL,
    registered_sequence bigint      NOT NULL,
    registered_at       timestamptz NOT NULL
);
COMMENT ON TABLE products IS 'One row a product: what it is called and how it is found. Its stock is in stock.';
COMMENT ON COLUMN products.words IS
    'The words of sku and name as the service splits and lowers them, for the search by beginnings of words. Not left to the parser of to_tsvector, which reads "KIT-0001" as a word and the number -1 and lowers by the locale.';
COMMENT ON COLUMN products.registered_sequence IS 'Stream sequence of its registration: before it there was no such product.';

-- Every sort of a list ends with the product: an order without ties, in which a page can begin anywhere.
-- Not unique: the ledger decides what is unique, and a projection must be able to show whatever the ledger says.
CREATE INDEX products_sku ON products (sku, product_id);
CREATE INDEX products_name ON products (name, product_id);
-- For the list of a category, and for finding its products in any other order.
CREATE INDEX products_category ON products (category, sku, product_id) WHERE category IS NOT NULL;
-- Most products are for sale; whoever asks for the others wants a few of very many.
CREATE INDEX products_inactive ON products (sku, product_id) WHERE NOT active;
CREATE INDEX products_words ON products USING gin (array_to_tsvector(words));

CREATE TABLE stock (
    product_id          uuid        PRIMARY KEY,
    quantity            integer     NOT NULL CHECK (quantity >= 0),
    is_available        boolean     NOT NULL GENERATED ALWAYS AS (quantity > 0) STORED,
    low_stock_threshold integer     CHECK (low_stock_threshold >= 0),
    sequence            bigint      NOT NULL,
    updated_at          timestamptz NOT NULL
);
COMMENT ON TABLE stock IS 'One row a product: its stock, and its version.';
COMMENT ON COLUMN stock.is_available IS 'quantity above OUT_OF_STOCK_THRESHOLD (0). Whether it is for sale at all is products.active.';
COMMENT ON COLUMN stock.low_stock_threshold IS 'A detail, kept here because it is compared with the quantity. Null is LOW_STOCK_THRESHOLD (3).';
COMMENT ON COLUMN stock.sequence IS 'Stream sequence of the last event that changed details or stock; the version of the product.';
COMMENT ON COLUMN stock.updated_at IS 'When the server stored that event.';

CREATE INDEX stock_quantity ON stock (quantity, product_id);
CREATE INDEX stock_sequence ON stock (sequence, product_id);
-- Holds only what is low, so that an order for anything else does not touch it.
CREATE INDEX stock_low ON stock (quantity, product_id) WHERE quantity <= COALESCE(low_stock_threshold, 3);

-- One index for history and for stock at an instant: within a product, the order of store times is the order of the
-- stream, and the sequence settles what was stored in the same microsecond.
DROP INDEX movements_product;
CREATE INDEX movements_product ON movements (product_id, stored_at, sequence);
-- The few changes that are not orders, among the very many that are.
CREATE INDEX movements_product_changes ON movements (product_id, stored_at, sequence) WHERE trigger <> 'ORDER_CONFIRMED';

CREATE TABLE counts (
    sequence   bigint      PRIMARY KEY,
    product_id uuid        NOT NULL,
    quantity   bigint      NOT NULL CHECK (quantity >= 0),
    counted_at timestamptz NOT NULL,
    counted_by uuid,
    event_id   uuid        NOT NULL,
    stored_at  timestamptz NOT NULL
);
COMMENT ON TABLE counts IS 'Every count of the warehouse or of an admin, as the stream tells it. Changes no stock by itself.';
COMMENT ON COLUMN counts.quantity IS 'As it was counted, also when it is more than a stock can be.';
COMMENT ON COLUMN counts.counted_at IS 'The moment that the count describes, by the clock of who counted.';
COMMENT ON COLUMN counts.counted_by IS 'The admin; null is the warehouse.';
CREATE INDEX counts_product ON counts (product_id, sequence);
