-- Stock metrics for analysts and store managers, folded from the INVENTORY stream by the analytics service. Disposable: the
-- schema can be dropped and is rebuilt from the stream. At the checkpoint's sequence the rows are the fold of the stream up
-- to it, whatever was delivered twice, late or out of order.
-- A day is a UTC day of the server's store time. Times are kept in microseconds, and no envelope's timestamp is used.
-- No schema is named: the search path decides, so that a rebuild can make the same tables beside the live ones.

CREATE TABLE checkpoint (
    projection            text        PRIMARY KEY,
    sequence              bigint      NOT NULL CHECK (sequence >= 0),
    skipped               bigint      NOT NULL DEFAULT 0 CHECK (skipped >= 0),
    clock                 timestamptz NOT NULL DEFAULT 'epoch',
    last_order            uuid,
    products              bigint      NOT NULL DEFAULT 0,
    active_products       bigint      NOT NULL DEFAULT 0,
    out_of_stock_products bigint      NOT NULL DEFAULT 0,
    low_stock_products    bigint      NOT NULL DEFAULT 0,
    units_in_stock        bigint      NOT NULL DEFAULT 0,
    updated_at            timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE checkpoint IS
    'How far the metrics have read, and the totals at that point. Locked first by each transaction that applies events, which takes only what follows its sequence: so two replicas never apply one event twice.';
COMMENT ON COLUMN checkpoint.sequence IS 'Last stream sequence that the rows reflect; 0 is empty.';
COMMENT ON COLUMN checkpoint.skipped IS 'Messages up to here that were not events of ours and were skipped. Not zero is an alarm.';
COMMENT ON COLUMN checkpoint.clock IS 'Store time of the last event; never goes back, whatever the clocks of the servers do.';
COMMENT ON COLUMN checkpoint.last_order IS 'The order of the last allocated line: its next line is no other order, also in the next transaction.';
COMMENT ON COLUMN checkpoint.out_of_stock_products IS 'Active products without any stock.';
COMMENT ON COLUMN checkpoint.low_stock_products IS 'Active products at or below their low-stock threshold, those without any stock among them.';

INSERT INTO checkpoint (projection, sequence) VALUES ('analytics', 0);

-- Details and stock are two tables, as in the inventory projection: stock changes with every order, and a row that changes
-- gets a new entry in each index of its table.
-- COLLATE "C": the same order on every server, whatever its locale, and the cheapest to compare.
CREATE TABLE products (
    product_id    uuid        PRIMARY KEY,
    sku           text        COLLATE "C" NOT NULL,
    name          text        COLLATE "C" NOT NULL,
    category      text        COLLATE "C",
    active        boolean     NOT NULL,
    registered_at timestamptz NOT NULL
);
COMMENT ON TABLE products IS 'One row a product: what it is called.';
-- Not unique: the ledger decides what is unique. Every sort ends with the product: an order without ties.
CREATE INDEX products_sku ON products (sku, product_id);
CREATE INDEX products_name ON products (name, product_id);
CREATE INDEX products_category ON products (category, sku, product_id) WHERE category IS NOT NULL;
-- Most products are for sale; whoever asks for the others wants a few of very many.
CREATE INDEX products_inactive ON products (sku, product_id) WHERE NOT active;

CREATE TABLE stock (
    product_id          uuid        PRIMARY KEY,
    quantity            integer     NOT NULL CHECK (quantity >= 0),
    low_stock_threshold integer     CHECK (low_stock_threshold >= 0),
    out_of_stock_since  timestamptz CHECK ((out_of_stock_since IS NOT NULL) = (quantity = 0)),
    sequence            bigint      NOT NULL,
    updated_at          timestamptz NOT NULL
);
COMMENT ON TABLE stock IS 'One row a product: its stock now.';
COMMENT ON COLUMN stock.low_stock_threshold IS 'Kept here because it is compared with the quantity. Null is LOW_STOCK_THRESHOLD (3).';
COMMENT ON COLUMN stock.out_of_stock_since IS 'Store time of the event that left it without stock: a change, or its registration.';
COMMENT ON COLUMN stock.sequence IS 'Stream sequence of the last event that changed details or stock.';
CREATE INDEX stock_quantity ON stock (quantity, product_id);
-- Holds only what is low, so that an order for anything else does not touch it.
CREATE INDEX stock_low ON stock (quantity, product_id) WHERE quantity <= COALESCE(low_stock_threshold, 3);

CREATE TABLE product_days (
    product_id                 uuid    NOT NULL,
    day                        date    NOT NULL,
    units_sold                 bigint  NOT NULL,
    orders_allocated           bigint  NOT NULL,
    adjustments                bigint  NOT NULL,
    units_adjusted_up          bigint  NOT NULL,
    units_adjusted_down        bigint  NOT NULL,
    corrections                bigint  NOT NULL,
    units_corrected_up         bigint  NOT NULL,
    units_corrected_down       bigint  NOT NULL,
    orders_refused             bigint  NOT NULL,
    units_refused_insufficient bigint  NOT NULL,
    units_refused_inactive     bigint  NOT NULL,
    stock_outs                 bigint  NOT NULL,
    out_of_stock_us            bigint  NOT NULL CHECK (out_of_stock_us >= 0),
    out_of_stock_since         timestamptz,
    closing_quantity           integer NOT NULL CHECK (closing_quantity >= 0),
    PRIMARY KEY (product_id, day)
);
COMMENT ON TABLE product_days IS
    'What happened to a product on a UTC day; no row for a day on which nothing did. The first row is of its registration. On each day: closing = closing of the row before - units_sold + units_adjusted_up - units_adjusted_down + units_corrected_up - units_corrected_down.';
COMMENT ON COLUMN product_days.orders_allocated IS 'Orders that took some of it.';
COMMENT ON COLUMN product_days.adjustments IS 'Changes by admins, the first stock of a registration among them, apart from the units they added and took: a typing mistake and its repair do not cancel out.';
COMMENT ON COLUMN product_days.corrections IS 'Changes by reconciliation against counts.';
COMMENT ON COLUMN product_days.orders_refused IS 'Orders that were refused because of it.';
COMMENT ON COLUMN product_days.units_refused_insufficient IS 'Units that those orders wanted of it, more than there were.';
COMMENT ON COLUMN product_days.stock_outs IS 'How often its stock went to 0.';
COMMENT ON COLUMN product_days.out_of_stock_us IS 'Microseconds of this day without stock, in intervals that ended on it.';
COMMENT ON COLUMN product_days.out_of_stock_since IS 'Beginning, within this day, of an interval that did not end on it. Whoever reads counts it up to the end of the day or to now.';
-- The primary key serves the days of a product, the sum over a window, and the last row before a day.

CREATE TABLE days (
    day                        date   PRIMARY KEY,
    events                     bigint NOT NULL,
    products_registered        bigint NOT NULL,
    units_sold                 bigint NOT NULL,
    orders_allocated           bigint NOT NULL,
    adjustments                bigint NOT NULL,
    units_adjusted_up          bigint NOT NULL,
    units_adjusted_down        bigint NOT NULL,
    corrections                bigint NOT NULL,
    units_corrected_up         bigint NOT NULL,
    units_corrected_down       bigint NOT NULL,
    orders_refused_insufficient bigint NOT NULL,
    orders_refused_inactive    bigint NOT NULL,
    orders_refused_unknown     bigint NOT NULL,
    units_refused_insufficient bigint NOT NULL,
    units_refused_inactive     bigint NOT NULL,
    units_refused_unknown      bigint NOT NULL,
    stock_outs                 bigint NOT NULL
);
COMMENT ON TABLE days IS 'What happened to all products on a UTC day.';
COMMENT ON COLUMN days.orders_allocated IS 'Orders, however many lines they had.';
COMMENT ON COLUMN days.units_refused_unknown IS 'Demand for products that do not exist is counted here alone: rows for ids that anybody can invent would have no bound.';
