//! Metrics of the process, for Prometheus to scrape.
//!
//! A process has one registry, as it has one subscriber for its logs: what is counted deep inside is not handed through
//! every signature. Each module owns its metrics as statics and registers them by [`Metrics::register`] when they are first
//! touched; `/metrics` shows them. Names are whole, with the unit last, except for counters: the format adds their `_total`.
//! Names of our own begin with `lomash_`; those without it are fixed by the contract.
//!
//! Labels are words out of a short list, never ids: each new value is a time series for ever.

use std::collections::HashSet;
use std::fmt;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric as _, prometheus_text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Metric, Registry};

pub use prometheus_client::metrics::counter::Counter;
pub use prometheus_client::metrics::family::Family;
pub use prometheus_client::metrics::gauge::Gauge;
pub use prometheus_client::metrics::histogram::Histogram;

/// What `/metrics` answers with.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Labels whose values are known when the program is written.
pub type Labels<const N: usize> = [(&'static str, &'static str); N];

/// Histograms by such labels.
pub type Histograms<const N: usize> = Family<Labels<N>, Histogram, fn() -> Histogram>;

/// Upper bounds in seconds for what takes between a millisecond and half a minute.
pub const SECONDS: [f64; 14] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];

/// A histogram over [`SECONDS`].
#[must_use]
pub fn seconds() -> Histogram {
    Histogram::new(SECONDS)
}

/// A registry; clones share it.
#[derive(Clone, Default)]
pub struct Metrics(Arc<Mutex<Inner>>);

#[derive(Default)]
struct Inner {
    registry: Registry,
    names: HashSet<&'static str>,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Metrics")
    }
}

static OF_PROCESS: LazyLock<Metrics> = LazyLock::new(Metrics::default);

impl Metrics {
    /// The registry of this process.
    #[must_use]
    pub fn of_process() -> &'static Self {
        &OF_PROCESS
    }

    /// Registers `metric` and gives it back. A counter's name is given without `_total`. A second metric of one name would
    /// make the whole page unreadable: it is left out, and logged.
    pub fn register<M: Metric + Clone>(&self, name: &'static str, help: &str, metric: M) -> M {
        self.once(name, |registry| registry.register(name, help, metric.clone()));
        metric
    }

    /// Registers gauges that are read when they are asked for: `read` gives labels and value of each, and must not wait.
    pub fn gauges<L, R, F>(&self, name: &'static str, help: &'static str, read: F)
    where
        L: EncodeLabelSet + 'static,
        R: IntoIterator<Item = (L, f64)>,
        F: Fn() -> R + Send + Sync + 'static,
    {
        self.collect(name, help, MetricType::Gauge, read);
    }

    /// The same for counts that something else keeps and that only grow; the name is without `_total`.
    pub fn counts<L, R, F>(&self, name: &'static str, help: &'static str, read: F)
    where
        L: EncodeLabelSet + 'static,
        R: IntoIterator<Item = (L, f64)>,
        F: Fn() -> R + Send + Sync + 'static,
    {
        self.collect(name, help, MetricType::Counter, read);
    }

    fn collect<L, R, F>(&self, name: &'static str, help: &'static str, kind: MetricType, read: F)
    where
        L: EncodeLabelSet + 'static,
        R: IntoIterator<Item = (L, f64)>,
        F: Fn() -> R + Send + Sync + 'static,
    {
        let read = move |encoder: &mut DescriptorEncoder<'_>| {
            let mut family = encoder.encode_descriptor(name, help, None, kind)?;
            for (labels, value) in read() {
                let one = family.encode_family(&labels)?;
                match kind {
                    MetricType::Counter => ConstCounter::new(value).encode(one)?,
                    _ => ConstGauge::new(value).encode(one)?,
                }
            }
            Ok(())
        };
        self.once(name, |registry| registry.register_collector(Box::new(Read { name, read })));
    }

    fn once(&self, name: &'static str, register: impl FnOnce(&mut Registry)) {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if inner.names.insert(name) {
            register(&mut inner.registry);
        } else {
            tracing::error!(metric = name, "a metric was registered twice; the second one is not shown");
        }
    }

    /// All of it in Prometheus's text format.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = String::new();
        let inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Writing into a string cannot fail.
        let _ = prometheus_text::encode(&mut text, &inner.registry);
        text
    }
}

struct Read<F> {
    name: &'static str,
    read: F,
}

impl<F> fmt::Debug for Read<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

impl<F> Collector for Read<F>
where
    F: Fn(&mut DescriptorEncoder<'_>) -> fmt::Result + Send + Sync + 'static,
{
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        (self.read)(&mut encoder)
    }
}

/// Says which program this is: `lomash_build_info{service="…",version="…"} 1`.
pub(crate) fn tell_build(service: &'static str) {
    static BUILD: std::sync::Once = std::sync::Once::new();
    BUILD.call_once(|| {
        // All crates of the workspace have one version.
        let labels = [("service", service), ("version", env!("CARGO_PKG_VERSION"))];
        Metrics::of_process().once("lomash_build", |registry| {
            registry.register("lomash_build", "Which program this is", Info::new(labels));
        });
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_has_names_types_and_labels_as_prometheus_wants_them() {
        let metrics = Metrics::default();
        let refused =
            metrics.register("lomash_orders_refused", "Orders refused", Family::<Labels<1>, Counter>::default());
        refused.get_or_create(&[("reason", "INSUFFICIENT_STOCK")]).inc_by(3);
        metrics.gauges("lomash_pool_connections", "Connections", || [([("pool", "reads")], 2.0)]);
        metrics.counts("lomash_cache_hits", "Hits", || [([("kind", "product")], 7.0)]);
        let took = metrics.register("lomash_took_seconds", "How long it took", seconds());
        took.observe(0.002);
        let page = metrics.text();
        for line in [
            "# TYPE lomash_orders_refused_total counter",
            "lomash_orders_refused_total{reason=\"INSUFFICIENT_STOCK\"} 3",
            "# TYPE lomash_pool_connections gauge",
            "lomash_cache_hits_total{kind=\"product\"} 7",
            "lomash_took_seconds_bucket{le=\"0.0025\"} 1",
            "lomash_took_seconds_count 1",
        ] {
            assert!(page.contains(line), "`{line}` is missing in\n{page}");
        }
    }

    #[test]
    fn a_name_is_shown_once() {
        let metrics = Metrics::default();
        metrics.register("lomash_things", "Things", Counter::<u64>::default()).inc();
        metrics.register("lomash_things", "Things", Counter::<u64>::default()).inc_by(5);
        assert_eq!(metrics.text().matches("# TYPE lomash_things_total").count(), 1);
    }
}
