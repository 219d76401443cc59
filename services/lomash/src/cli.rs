//! The command line as a whole: what there is, and how a command ends.
//!
//! Owns the exit code and the last words. A command that nobody reads any more ends quietly; one that is told to end by Ctrl-C
//! or SIGTERM is dropped where it stands, says what it waited for, and ends at once. Those that have servers to stop listen for
//! the signals themselves.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use lomash_platform::telemetry::{self, LogFormat};
use lomash_platform::{process, shutdown};

use crate::{
    backup, bench, cluster, demo, dlq, import, mail_sink, orders, output, rebuild, reconcile, replay, restore, status,
    streams, token, up, verify,
};

/// How a command ends that was told to by Ctrl-C or SIGTERM, as a shell has it for the former.
const INTERRUPTED: u8 = 130;

/// Lomash Inventory: stock that is never oversold, lost or double-counted.
#[derive(Debug, Parser)]
#[command(name = "lomash", version)]
pub struct Cli {
    /// How log lines look.
    #[arg(long, env = "LOG_FORMAT", value_enum, default_value_t = LogFormat::Pretty, global = true)]
    pub log_format: LogFormat,

    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What there is to be done.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start NATS, Postgres, Redis, a mail server and the services on this machine, until Ctrl-C.
    Up(up::UpArgs),
    /// Start three NATS nodes with TLS and identities, and the services against them; `--check` kills them under load.
    Cluster(cluster::ClusterArgs),
    /// Show the whole way of orders on real servers, check every number, and end.
    Demo(demo::DemoArgs),
    /// Import a catalogue of products.
    Import(import::ImportArgs),
    /// Publish orders from a file.
    #[command(subcommand)]
    Orders(orders::OrdersCommand),
    /// Check the whole ledger and its projection.
    Verify(verify::VerifyArgs),
    /// Build the projection anew from the stream, beside the live one, and swap them.
    Rebuild(rebuild::RebuildArgs),
    /// Correct the stock by the counts of the warehouse.
    Reconcile(reconcile::ReconcileArgs),
    /// Look through dead letters, bring their messages back, or remove them.
    #[command(subcommand)]
    Dlq(dlq::DlqCommand),
    /// Measure this system beside its rivals and the limit of the server.
    Bench(bench::BenchArgs),
    /// Replay stored messages to standard output, a file or a subject.
    Replay(replay::ReplayArgs),
    /// Write the streams into an archive, or what came since; `--check` proves its hashes.
    Backup(backup::BackupArgs),
    /// Restore an archive into empty servers, and prove that it is equal.
    Restore(restore::RestoreArgs),
    /// Compare streams and consumers with their definitions, and bring them to it.
    #[command(subcommand)]
    Streams(streams::StreamsCommand),
    /// Show streams, consumers, lag and checkpoints.
    Status(status::StatusArgs),
    /// Keep mails as files instead of delivering them; `up` starts it.
    #[command(hide = true)]
    MailSink(mail_sink::MailSinkArgs),
    /// Mint a bearer token for development.
    Token(token::TokenArgs),
}

impl Command {
    /// Whether it has servers or files to put away when it is told to end, and does so itself.
    const fn ends_itself(&self) -> bool {
        matches!(self, Self::Up(_) | Self::Cluster(_) | Self::Demo(_) | Self::Bench(_) | Self::MailSink(_))
    }

    async fn run(self) -> anyhow::Result<ExitCode> {
        match self {
            Self::Up(args) => up::run(args).await.map(|()| ExitCode::SUCCESS),
            Self::Cluster(args) => cluster::run(args).await,
            Self::Demo(args) => demo::run(args).await,
            Self::Import(args) => import::run(args).await,
            Self::Orders(command) => orders::run(command).await.map(|()| ExitCode::SUCCESS),
            Self::Verify(args) => verify::run(args).await,
            Self::Rebuild(args) => rebuild::run(args).await,
            Self::Reconcile(args) => reconcile::run(args).await,
            Self::Dlq(command) => dlq::run(command).await,
            Self::Bench(args) => bench::run(args).await,
            Self::Replay(args) => replay::run(args).await,
            Self::Backup(args) => backup::run(args).await,
            Self::Restore(args) => restore::run(args).await,
            Self::Streams(command) => streams::run(command).await,
            Self::Status(args) => status::run(args).await,
            Self::MailSink(args) => mail_sink::run(args).await.map(|()| ExitCode::SUCCESS),
            Self::Token(args) => token::run(&args).map(|()| ExitCode::SUCCESS),
        }
    }
}

/// What `main` does.
#[must_use]
pub fn main(cli: Cli) -> ExitCode {
    process::run(async {
        let telemetry = telemetry::start("lomash", cli.log_format, telemetry::COMMAND_FILTER);
        let outcome = until_interrupted(cli.command).await;
        telemetry.stop().await;
        let outcome = outcome.and_then(|code| output::problem().map(|()| code));
        outcome.unwrap_or_else(|error| {
            if output::is_unread(&error) {
                return ExitCode::SUCCESS;
            }
            output::tell(format_args!("error: {error:#}"));
            ExitCode::FAILURE
        })
    })
}

async fn until_interrupted(command: Command) -> anyhow::Result<ExitCode> {
    if command.ends_itself() {
        return command.run().await;
    }
    let stop = shutdown::token()?;
    tokio::select! {
        biased;
        interrupted = shutdown::interruption(&stop) => {
            output::tell(interrupted);
            Ok(ExitCode::from(INTERRUPTED))
        }
        outcome = command.run() => outcome,
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }
}
