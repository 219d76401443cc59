-- The projection of the INVENTORY stream for reads. Disposable: it can be dropped and rebuilt from the stream, and
-- nothing on the write path reads it. Every row names the stream sequence that wrote it and holds absolute values.
-- No schema is named: the search path decides, so that a rebuild can make the same tables beside the live ones.

CREATE TABLE checkpoint (
    projection   text        PRIMARY KEY,
    sequence     bigint      NOT NULL CHECK (sequence >= 0),
    skipped      bigint      NOT NULL DEFAULT 0 CHECK (skipped >= 0),
    updated_at   timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE checkpoint IS
    'How far each projection has read. Moved in the transaction that writes the rows, by UPDATE ... WHERE sequence = expected, which also fences a projector that was believed dead.';
COMMENT ON COLUMN checkpoint.sequence IS 'Last stream sequence that the rows reflect; 0 is an empty projection.';
COMMENT ON COLUMN checkpoint.skipped IS 'Messages up to here that were not events of ours and were skipped. Not zero is an alarm.';

INSERT INTO checkpoint (projection, sequence) VALUES ('inventory', 0);

CREATE TABLE products (
    product_id          uuid        PRIMARY KEY,
    sku                 text        NOT NULL,
    name                text        NOT NULL,
    category            text,
    low_stock_threshold integer     CHECK (low_stock_threshold >= 0),
    active              boolean     NOT NULL,
    quantity            integer     NOT NULL DEFAULT 0 CHECK (quantity >= 0),
    is_available        boolean     NOT NULL GENERATED ALWAYS AS (quantity > 0) STORED,
    sequence            bigint      NOT NULL,
    registered_at       timestamptz NOT NULL,
    updated_at          timestamptz NOT NULL
);
COMMENT ON TABLE products IS 'One row a product: its details and its stock.';
COMMENT ON COLUMN products.is_available IS 'quantity above OUT_OF_STOCK_THRESHOLD (0). Whether it is for sale at all is "active".';
COMMENT ON COLUMN products.sequence IS 'Stream sequence of the last event that changed this row; the version of the product.';
COMMENT ON COLUMN products.updated_at IS 'When the server stored that event.';
-- Not unique: the ledger decides what is unique, and a projection must be able to show whatever the ledger says.
CREATE INDEX products_sku ON products (sku);

CREATE TABLE movements (
    sequence          bigint      PRIMARY KEY,
    product_id        uuid        NOT NULL,
    previous_quantity integer     NOT NULL,
    new_quantity      integer     NOT NULL,
    trigger           text        NOT NULL,
    order_id          uuid,
    updated_by        uuid,
    reason            text,
    event_id          uuid        NOT NULL,
    occurred_at       timestamptz NOT NULL,
    stored_at         timestamptz NOT NULL
);
COMMENT ON TABLE movements IS 'Every change of stock, as the stream tells it.';
COMMENT ON COLUMN movements.updated_by IS 'The admin; null is the system.';
COMMENT ON COLUMN movements.occurred_at IS 'The writer''s clock. Shown, never used for ordering.';
COMMENT ON COLUMN movements.stored_at IS 'The server''s clock, which never goes backwards with the sequence.';
CREATE INDEX movements_product ON movements (product_id, sequence);
CREATE INDEX movements_order ON movements (order_id) WHERE order_id IS NOT NULL;

CREATE TABLE order_decisions (
    order_id   uuid        PRIMARY KEY,
    outcome    text        NOT NULL CHECK (outcome IN ('allocated', 'refused')),
    reason     text        CHECK ((outcome = 'refused') = (reason IS NOT NULL)),
    items      jsonb       CHECK ((outcome = 'refused') = (items IS NOT NULL)),
    sequence   bigint      NOT NULL,
    decided_at timestamptz NOT NULL
);
COMMENT ON TABLE order_decisions IS 'What happened to each order, once. The lines of an allocated order are its movements.';
COMMENT ON COLUMN order_decisions.items IS 'The failing lines of a refused order, as in inventory-update-failed.';
COMMENT ON COLUMN order_decisions.sequence IS 'Stream sequence of the order''s first event.';
