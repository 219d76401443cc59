//! The study of cost: processor time, bytes written and memory of each process, with few products and with many, with few
//! orders decided before and with more.
//!
//! Everything that happens to an order is counted, from its publishing (in batches) to its rows in Postgres, while the
//! service runs: the deltas of what /proc tells of each process and its children, divided by the orders. This process, which
//! publishes, is not counted.

use super::bed::Bed;
use super::report::{Row, Study};
use super::scenario::Scenario;
use super::studies::Effort;
use super::usage::Usage;
use super::workload::Source;
use crate::output;

/// Names of the figures of a process.
const FIGURES: [(&str, [&str; 3]); 4] = [
    ("product", ["product µs", "product B", "product MB"]),
    ("NATS", ["NATS µs", "NATS B", "NATS MB"]),
    ("Postgres", ["Postgres µs", "Postgres B", "Postgres MB"]),
    ("Redis", ["Redis µs", "Redis B", "Redis MB"]),
];

/// What is measured on several beds for one study.
#[derive(Debug, Default)]
pub(super) struct Costs {
    rows: Vec<Row>,
    /// Of each row: processor time of all processes for an order.
    cpu: Vec<f64>,
    /// What was wrong with the books of a bed.
    problem: Option<String>,
}

impl Costs {
    /// Measures the cost of some orders, then of as many after `history` more were decided.
    pub async fn measure(
        &mut self,
        bed: &mut Bed,
        source: &mut Source,
        history: usize,
        effort: Effort,
    ) -> anyhow::Result<()> {
        let (count, show) = (effort.extent.one_line, effort.show);
        bed.start_service().await?;
        bed.quiet().await?;
        for history in [0, history.max(count)] {
            bed.put(source, history, "cost", show).await?;
            bed.quiet().await?;
            let decided = bed.due.0 + bed.due.1;
            let before = bed.usage()?;
            bed.put(source, count, "cost", show).await?;
            bed.quiet().await?;
            let after = bed.usage()?;
            let what = format!(
                "{} products, {} orders before",
                output::thousands(source.products.len() as u64),
                output::thousands(decided)
            );
            self.cpu.push(after.iter().zip(&before).map(|(now, then)| now.1.cpu_seconds - then.1.cpu_seconds).sum());
            self.rows.push(Row::new(what, figures(before, after, count)));
        }
        bed.stop_service().await?;
        if let Some(problem) = bed.problem().await? {
            self.problem = Some(problem);
        }
        Ok(())
    }

    /// The study.
    pub fn into_study(self) -> Study {
        let mut study = Study::new(Scenario::Cost, "cost of an order: processor time, bytes written; memory then");
        study.rows = self.rows;
        if let [early, late, early_of_many, late_of_many] = self.cpu[..] {
            study.ratio("cost_cpu_more_orders_over_fewer", late / early);
            study.ratio("cost_cpu_many_products_over_few", early_of_many / early);
            study.ratio("cost_cpu_many_products_more_orders_over_fewer", late_of_many / early_of_many);
        }
        study.checked(self.problem)
    }
}

fn figures(
    before: [(&'static str, Usage); 4],
    after: [(&'static str, Usage); 4],
    orders: usize,
) -> Vec<(&'static str, f64)> {
    let mut figures = Vec::new();
    let mut total = [0.0; 3];
    for (((_, then), (_, now)), (_, names)) in before.into_iter().zip(after).zip(FIGURES) {
        let values = [
            (now.cpu_seconds - then.cpu_seconds) * 1e6 / orders as f64,
            now.written_bytes.saturating_sub(then.written_bytes) as f64 / orders as f64,
            megabytes(now.resident_bytes),
        ];
        for (sum, value) in total.iter_mut().zip(values) {
            *sum += value;
        }
        figures.extend(names.into_iter().zip(values));
    }
    let names = ["all µs", "all B", "all MB"];
    names.into_iter().zip(total).chain(figures).collect()
}

/// Bytes as the figures have them.
pub(super) fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}
