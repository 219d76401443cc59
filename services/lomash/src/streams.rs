//! `lomash streams`: compares the servers with `streams/`, and brings them to it where that does no harm.
//!
//! Owns what is shown; what may be changed is decided in `lomash_ledger::upkeep`. For an administrator: no service may
//! make or change a stream.

use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Args, Subcommand};
use lomash_ledger::streams::{self, Difference};
use lomash_ledger::upkeep::{self, Action, Step};
use lomash_platform::nats;
use product_service::monitoring::Monitor;
use serde::Serialize;

use crate::output::{self, Cell};

/// Name under which the program connects.
const CLIENT_NAME: &str = "lomash streams";

/// Subcommands of `lomash streams`.
#[derive(Clone, Debug, Subcommand)]
pub enum StreamsCommand {
    /// Show in what the servers differ from `streams/`; fails if they do.
    Diff(ServerArgs),
    /// Make what is missing, and change what can be changed without harm; fails if something else differs.
    Apply(ApplyArgs),
}

/// Which servers.
#[derive(Clone, Debug, Args)]
pub struct ServerArgs {
    /// Who asks: the administrator.
    #[command(flatten)]
    pub servers: nats::Servers,
    /// Copies of each stream: 1 on a laptop, 3 in a cluster. More on the server is no difference.
    #[arg(long, env = "STREAM_REPLICAS", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=5))]
    pub replicas: u32,
    /// Monitoring addresses of the servers, such as `http://127.0.0.1:8222`, comma-separated: then it is also looked at
    /// whether each of them acknowledges only what is on disk. No stream says so.
    #[arg(long, env = "NATS_MONITOR_URL", value_delimiter = ',', value_name = "URL")]
    pub monitor: Vec<String>,
    /// Print it as JSON.
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `lomash streams apply`.
#[derive(Clone, Debug, Args)]
pub struct ApplyArgs {
    /// Which servers.
    #[command(flatten)]
    pub server: ServerArgs,
    /// Show what would be done, and do nothing.
    #[arg(long)]
    pub dry_run: bool,
}

/// What is to be done, and whether it was.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Told<'s> {
    applied: bool,
    steps: &'s [Step],
    hasty_servers: &'s [String],
}

/// Runs the command. Success is a server that is as `streams/` says.
///
/// # Errors
/// When the servers do not answer or refuse a step; steps before it are done.
pub async fn run(command: StreamsCommand) -> anyhow::Result<ExitCode> {
    let (server, apply) = match command {
        StreamsCommand::Diff(server) => (server, false),
        StreamsCommand::Apply(ApplyArgs { server, dry_run }) => (server, !dry_run),
    };
    let (client, refusals) = server.servers.connect(CLIENT_NAME).await?;
    let context = async_nats::jetstream::new(client);
    let steps = refusals
        .guard(async {
            streams::wait_until_ready(&context).await?;
            let steps = upkeep::plan(&context, server.replicas).await?;
            if apply {
                for step in &steps {
                    upkeep::carry_out(&context, step)
                        .await
                        .with_context(|| format!("{} stays as it was", step.name))?;
                }
            }
            anyhow::Ok(steps)
        })
        .await??;
    let hasty_servers = hasty(&server.monitor).await?;
    if server.json {
        output::print_json(&Told { applied: apply, steps: &steps, hasty_servers: &hasty_servers })?;
    } else {
        output::print(render(&steps, apply));
        for server in &hasty_servers {
            output::say(format_args!(
                "{server} acknowledges what is not on disk yet: set `sync_interval: always` in its `jetstream` block."
            ));
        }
    }
    let is_right = |step: &Step| step.refused.is_empty() && (apply || step.action == Action::Leave);
    Ok(if steps.iter().all(is_right) && hasty_servers.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Which of the servers at these monitoring addresses acknowledge what is not on disk yet.
///
/// # Errors
/// When one does not answer.
pub async fn hasty(monitors: &[String]) -> anyhow::Result<Vec<String>> {
    let monitor = Monitor::new()?;
    let mut hasty = Vec::new();
    for address in monitors {
        hasty.extend(monitor.weakness(address).await?.map(|weakness| weakness.name));
    }
    Ok(hasty)
}

/// The steps as a person reads them.
#[must_use]
pub fn render(steps: &[Step], applied: bool) -> String {
    let mut table = output::table(&["stream or consumer", "field", "on the server", "in streams/", ""]);
    let cells = |name: &str, Difference { field, defined, actual, .. }: &Difference, what: &str| {
        [name, field.as_str(), &actual.to_string(), &defined.to_string(), what].map(Cell::new)
    };
    let mut why = String::new();
    for step in steps {
        match step.action {
            Action::Create => {
                let what = if applied { "made" } else { "to be made" };
                table.add_row([step.name.as_str(), "", "missing", "", what].map(Cell::new));
            }
            Action::Leave | Action::Update => {
                for change in &step.changes {
                    table.add_row(cells(&step.name, change, if applied { "changed" } else { "can be changed" }));
                }
            }
        }
        for refused in &step.refused {
            table.add_row(cells(&step.name, &refused.difference, "left alone"));
            why.push_str(&format!("{}: {} is left alone: {}.\n", step.name, refused.difference.field, refused.why));
        }
    }
    if table.is_empty() {
        return format!("{} streams and consumers are as streams/ says, from their leaders.\n", steps.len());
    }
    format!("{table}\n{why}")
}
