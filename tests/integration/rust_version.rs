//! The Rust that this project builds with is said in one place, `rust-version` of the root `Cargo.toml`: the lockfile needs no
//! newer one, and every document, script and image that names a version names that one.
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

/// Where a version of Rust is named, and the words before it.
const NAMED: [(&str, &str); 3] =
    [("README.md", "need Rust "), ("CONTRIBUTING.md", "Git and Rust "), ("deploy/Containerfile", "library/rust:")];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(file: &str) -> Result<String> {
    std::fs::read_to_string(root().join(file)).with_context(|| file.to_owned())
}

/// `1.92` is 1.92.0, and newer than 1.9.
fn version(text: &str) -> Result<[u32; 3]> {
    let mut numbers = [0; 3];
    let parts: Vec<&str> = text.split('.').collect();
    ensure!(parts.len() <= numbers.len(), "{text} is no version of Rust");
    for (number, part) in numbers.iter_mut().zip(parts) {
        *number = part.parse().with_context(|| format!("{text} is no version of Rust"))?;
    }
    Ok(numbers)
}

/// The version that begins here.
fn leading_version(text: &str) -> &str {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    text[..end].trim_end_matches('.')
}

/// What the workspace says, as cargo reads it, and every package of the lockfile that this machine builds.
fn metadata() -> Result<Value> {
    let platform = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--locked", "--offline", "--format-version", "1", "--filter-platform", &platform])
        .current_dir(root())
        .output()
        .context("cargo cannot be run")?;
    ensure!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn text<'v>(value: &'v Value, name: &str) -> &'v str {
    value[name].as_str().unwrap_or_default()
}

/// The packages that want a newer Rust than the stated one.
fn too_new(packages: &[Value], stated: &str) -> Result<Vec<String>> {
    let most = version(stated)?;
    let mut found = Vec::new();
    for package in packages {
        let Some(wants) = package["rust_version"].as_str() else { continue };
        if version(wants)? > most {
            found.push(format!("{} {} wants Rust {wants}", text(package, "name"), text(package, "version")));
        }
    }
    Ok(found)
}

#[test]
fn no_dependency_wants_a_newer_rust_than_is_stated() -> Result<()> {
    let metadata = metadata()?;
    let packages = metadata["packages"].as_array().context("packages")?;
    let ours: Vec<&Value> = packages.iter().filter(|package| package["source"].is_null()).collect();
    ensure!(ours.len() >= 9, "the members of the workspace: {}", ours.len());
    let stated = text(ours[0], "rust_version");
    for package in &ours {
        assert_eq!(text(package, "rust_version"), stated, "{} has another rust-version", text(package, "name"));
    }
    let found = too_new(packages, stated)?;
    assert!(found.is_empty(), "rust-version is {stated}, and\n{}", found.join("\n"));
    // A version lower than what the lockfile needs would be noticed.
    let lowest = too_new(packages, "1.70")?;
    assert!(!lowest.is_empty() && version("1.9")? < version("1.88")?, "nothing was compared");
    Ok(())
}

#[test]
fn every_document_names_the_stated_rust() -> Result<()> {
    let stated = metadata()?["packages"]
        .as_array()
        .context("packages")?
        .iter()
        .find(|package| text(package, "name") == "lomash-tests")
        .map(|package| text(package, "rust_version").to_owned())
        .context("this package")?;
    for (file, before) in NAMED {
        let written = read(file)?;
        let mentions: Vec<&str> = written.split(before).skip(1).map(leading_version).collect();
        assert_eq!(mentions, [stated.as_str()], "{file} names the Rust of `rust-version` once, after `{before}`");
    }
    // Whatever else names one is caught, too; the script reads it from Cargo.toml.
    for file in ["README.md", "CONTRIBUTING.md", "deploy/dev/setup.sh", "docs/operations.md"] {
        let written = read(file)?;
        for named in written.split("Rust 1.").skip(1).map(leading_version) {
            assert_eq!(format!("1.{named}"), stated, "{file}");
        }
    }
    Ok(())
}
