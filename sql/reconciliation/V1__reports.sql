-- Reports of reconciliation runs: what was counted, what was corrected, what was refused and why. Facts are in the stream;
-- a report says how a run came to them. Kept when the projection is rebuilt: it cannot be made anew from the stream.
-- No schema is named: the search path decides, as for the projection.

CREATE TABLE runs (
    run_id             uuid        PRIMARY KEY,
    status             text        NOT NULL CHECK (status IN ('queued', 'planning', 'applying', 'dryRun',
                                   'awaitingApproval', 'completed', 'failed', 'rejected', 'superseded')),
    started_by         text        NOT NULL CHECK (started_by IN ('schedule', 'request')),
    requested_by       uuid,
    figures            text        NOT NULL CHECK (figures IN ('all', 'warehouse', 'counts')),
    dry_run            boolean     NOT NULL,
    threshold_percent  integer     NOT NULL CHECK (threshold_percent BETWEEN 0 AND 100),
    requested_at       timestamptz NOT NULL,
    started_at         timestamptz,
    finished_at        timestamptz,
    attempts           integer     NOT NULL DEFAULT 0,
    sequence           bigint,
    counts_through     bigint,
    catalogue_products bigint,
    counted            bigint      NOT NULL DEFAULT 0,
    changed            bigint      NOT NULL DEFAULT 0,
    unchanged          bigint      NOT NULL DEFAULT 0,
    refused            bigint      NOT NULL DEFAULT 0,
    units_up           bigint      NOT NULL DEFAULT 0,
    units_down         bigint      NOT NULL DEFAULT 0,
    shortfall          bigint      NOT NULL DEFAULT 0,
    decided_by         uuid,
    decided_at         timestamptz,
    problem            text
);
COMMENT ON TABLE runs IS 'One row a reconciliation run.';
COMMENT ON COLUMN runs.requested_by IS 'The admin; null is the system.';
COMMENT ON COLUMN runs.requested_at IS 'When the message that starts the run was asked for or, for the schedule, stored.';
COMMENT ON COLUMN runs.attempts IS 'How often a replica took the run up; more than once after a crash or a failure.';
COMMENT ON COLUMN runs.sequence IS 'Stream sequence of the projection that the plan was made on.';
COMMENT ON COLUMN runs.counts_through IS 'Confirmed counts up to this stream sequence are dealt with by this run; the next one begins after it.';
COMMENT ON COLUMN runs.decided_at IS 'When a waiting run was approved or rejected, by decided_by; null there is the system.';
-- Lists go from the newest to the oldest.
CREATE INDEX runs_requested ON runs (requested_at, run_id);

CREATE TABLE run_rows (
    run_id         uuid    NOT NULL REFERENCES runs ON DELETE CASCADE,
    number         integer NOT NULL,
    source         text    NOT NULL CHECK (source IN ('warehouse', 'counts')),
    position       bigint  NOT NULL,
    product_id     uuid,
    sku            text,
    counted        bigint,
    counted_at     timestamptz,
    counted_by     text,
    stock_at_count bigint,
    before         bigint,
    correction     bigint,
    after          bigint  CHECK (after >= 0),
    shortfall      bigint  NOT NULL,
    result         text    NOT NULL CHECK (result IN ('planned', 'corrected', 'unchanged', 'refused')),
    refusal        jsonb   CHECK ((result = 'refused') = (refusal IS NOT NULL)),
    PRIMARY KEY (run_id, number)
);
COMMENT ON TABLE run_rows IS 'One row a figure of a run, in the order of its source. Stored with the plan, before anything is corrected.';
COMMENT ON COLUMN run_rows.position IS 'Place in the source: the row of the warehouse''s answer, or the stream sequence of the count.';
COMMENT ON COLUMN run_rows.stock_at_count IS 'The ledger''s stock at the moment of the count, with the corrections stored since.';
COMMENT ON COLUMN run_rows.before IS 'Stock before the correction; while the row is planned, as the plan found it.';
COMMENT ON COLUMN run_rows.correction IS 'counted - stock_at_count.';
COMMENT ON COLUMN run_rows.shortfall IS 'By how much the correction would have gone below zero.';
COMMENT ON COLUMN run_rows.refusal IS 'Why the row was refused: a reason for programs and a sentence for people.';
-- A run that was interrupted goes on with these.
CREATE INDEX run_rows_planned ON run_rows (run_id, number) WHERE result = 'planned';
