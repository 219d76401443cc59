-- Low-stock alerts: what was found in the ledger, what was told on NATS and by mail, and what still waits to be.
-- Alerts and mails are facts of this service: dropped, past alerts are found again in the ledger, but what was mailed within
-- the last day would be mailed again. No schema is named: the search path decides, as for the projection.

CREATE TABLE checkpoint (
    is_the_row boolean PRIMARY KEY DEFAULT true CHECK (is_the_row),
    sequence   bigint  NOT NULL
);
COMMENT ON TABLE checkpoint IS 'One row. Whoever records locks it first, so that two replicas never record at once.';
COMMENT ON COLUMN checkpoint.sequence IS 'Every message of the consumer up to this stream sequence is recorded. A replay of older ones does nothing.';
INSERT INTO checkpoint (sequence) VALUES (0);

CREATE TABLE products (
    product_id uuid    PRIMARY KEY,
    quantity   bigint  NOT NULL CHECK (quantity >= 0),
    sequence   bigint  NOT NULL,
    is_low     boolean NOT NULL
);
COMMENT ON TABLE products IS 'Stock as seen by this service, for the rule by which readers admit events, and for the policy `edge`.';
COMMENT ON COLUMN products.sequence IS 'Stream sequence of the event that wrote the row.';
COMMENT ON COLUMN products.is_low IS 'An alert was raised since the stock was last above its threshold.';

CREATE TABLE details (
    product_id uuid   NOT NULL,
    sequence   bigint NOT NULL,
    name       text   NOT NULL,
    threshold  bigint,
    PRIMARY KEY (product_id, sequence)
);
COMMENT ON TABLE details IS 'Every registration and revision. A change of stock is judged by the last one before its own sequence.';
COMMENT ON COLUMN details.threshold IS 'The product''s own; null takes the one of the service''s configuration.';

CREATE TABLE mails (
    mail_id    uuid        PRIMARY KEY,
    kind       text        NOT NULL CHECK (kind IN ('lowStock', 'recovered', 'digest')),
    state      text        NOT NULL DEFAULT 'waiting' CHECK (state IN ('waiting', 'sent', 'failed')),
    sequence   bigint      NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    due_at     timestamptz,
    attempts   integer     NOT NULL DEFAULT 0,
    sent_at    timestamptz CHECK ((state = 'sent') = (sent_at IS NOT NULL)),
    problem    text
);
COMMENT ON TABLE mails IS 'The outbox. A row is locked while it is being sent, so each mail is sent by one replica; a replica that dies lets go of it.';
COMMENT ON COLUMN mails.mail_id IS 'The eventId of the cause, or the id of the digest''s period; Message-ID is made of it.';
COMMENT ON COLUMN mails.sequence IS 'Stream sequence of the (first) cause: mails that are due at once go out in this order.';
COMMENT ON COLUMN mails.due_at IS 'Not before; null until the notification is published (a recovery: until those before it are).';
COMMENT ON COLUMN mails.problem IS 'Why the last attempt did not succeed; of a mail that was sent, which recipients were refused.';
CREATE INDEX mails_due ON mails (due_at, sequence) WHERE state = 'waiting';
CREATE INDEX mails_failed ON mails (sequence) WHERE state = 'failed';

CREATE TABLE alerts (
    caused_by         uuid        PRIMARY KEY,
    kind              text        NOT NULL CHECK (kind IN ('lowStock', 'recovered')),
    sequence          bigint      NOT NULL,
    product_id        uuid        NOT NULL,
    sku               text        NOT NULL,
    name              text        NOT NULL,
    previous_quantity bigint      NOT NULL,
    quantity          bigint      NOT NULL,
    threshold         bigint      NOT NULL,
    trigger           text        NOT NULL,
    order_id          uuid,
    updated_by        text        NOT NULL,
    occurred_at       timestamptz NOT NULL,
    stored_at         timestamptz NOT NULL,
    recorded_at       timestamptz NOT NULL DEFAULT now(),
    traceparent       text,
    tracestate        text,
    event_id          uuid        NOT NULL,
    published_at      timestamptz,
    mail_id           uuid,
    not_mailed        text        CHECK (not_mailed IN ('old', 'edge')),
    CHECK ((mail_id IS NULL) = (not_mailed IS NOT NULL))
);
COMMENT ON TABLE alerts IS 'One row a causing event: each qualifying change of stock, and under the policy `edge` each recovery.';
COMMENT ON COLUMN alerts.caused_by IS 'eventId of the cause; once per cause, whatever comes again.';
COMMENT ON COLUMN alerts.sequence IS 'Stream sequence of the cause.';
COMMENT ON COLUMN alerts.occurred_at IS 'The timestamp of the cause''s envelope.';
COMMENT ON COLUMN alerts.stored_at IS 'When the server stored the cause.';
COMMENT ON COLUMN alerts.traceparent IS 'W3C trace context of the cause, for the notification and the mail.';
COMMENT ON COLUMN alerts.event_id IS 'eventId of the notification, derived from the cause.';
COMMENT ON COLUMN alerts.published_at IS 'When NOTIFICATIONS confirmed the notification; null while it waits. A recovery is not published; then, when it took its turn.';
COMMENT ON COLUMN alerts.mail_id IS 'The mail that tells it.';
COMMENT ON COLUMN alerts.not_mailed IS 'Why no mail tells it: `old`, the cause was past when it was first seen; `edge`, the product was low already.';
CREATE INDEX alerts_unpublished ON alerts (sequence) WHERE published_at IS NULL;
CREATE INDEX alerts_of_mail ON alerts (mail_id, sequence);
-- Lists go from the newest to the oldest.
CREATE INDEX alerts_by_sequence ON alerts (sequence);
