//! The notification service: low-stock notifications on NATS and by mail, once per causing event.

pub mod alerts;
pub mod books;
pub mod http;
pub mod low_stock;
pub mod mail;
pub mod mailer;
pub mod observed;
pub mod publishing;
pub mod recorder;
pub mod sending;
pub mod service;
