//! The notification service: low-stock notifications on NATS and by mail, once per causing event.

pub mod service;
