//! The picture of a report: one group of bars a scenario, as SVG that any browser shows.

use std::fmt::Write as _;

use super::report::{Contestant, Report};
use crate::output;

const WIDTH: u32 = 960;
const MARGIN: u32 = 24;
/// Where bars begin; their names stand before.
const BARS_FROM: u32 = 300;
/// The longest bar; its figure stands after it.
const BAR_WIDTH: f64 = 400.0;
const BAR_HEIGHT: u32 = 20;
const ROW: u32 = 28;
const HEADING: u32 = 44;

const fn colour(contestant: Contestant) -> &'static str {
    match contestant {
        Contestant::Ours => "#1f6f8b",
        Contestant::Limit => "#9aa5ad",
        Contestant::Bare => "#c3cad0",
        Contestant::Rival1 => "#c98b4f",
        Contestant::Rival2 => "#a4553a",
        Contestant::Rival3 => "#7d3f5c",
    }
}

/// Draws the medians as bars and the spreads as lines on them. Every scenario has a scale of its own.
#[must_use]
pub fn draw(report: &Report) -> String {
    let mut body = String::new();
    let mut y = MARGIN + 16;
    let _ = writeln!(body, r#"<text x="{MARGIN}" y="{y}" class="title">Orders a second, median and spread</text>"#);
    for scenario in &report.scenarios {
        y += HEADING;
        let title = format!("{} ({} orders)", scenario.title, output::thousands(scenario.orders));
        let _ = writeln!(body, r#"<text x="{MARGIN}" y="{y}" class="group">{}</text>"#, escaped(&title));
        y += 10;
        let spreads = scenario.results.iter().filter_map(|result| result.orders_per_second);
        let longest = spreads.map(|spread| spread.max).fold(f64::MIN_POSITIVE, f64::max);
        for result in &scenario.results {
            let text_y = y + 15;
            let name = escaped(result.contestant.title());
            let _ = writeln!(body, r#"<text x="{MARGIN}" y="{text_y}">{name}</text>"#);
            match result.orders_per_second {
                Some(spread) => {
                    let length = |rate: f64| rate / longest * BAR_WIDTH;
                    let _ = writeln!(
                        body,
                        r#"<rect x="{BARS_FROM}" y="{y}" width="{:.1}" height="{BAR_HEIGHT}" fill="{}"/>"#,
                        length(spread.median),
                        colour(result.contestant)
                    );
                    let from = f64::from(BARS_FROM);
                    let _ = writeln!(
                        body,
                        r##"<line x1="{:.1}" x2="{:.1}" y1="{2}" y2="{2}" stroke="#222222" stroke-width="2"/>"##,
                        from + length(spread.min),
                        from + length(spread.max),
                        y + BAR_HEIGHT / 2
                    );
                    let _ = writeln!(
                        body,
                        r#"<text x="{:.1}" y="{text_y}">{}</text>"#,
                        from + length(spread.max) + 8.0,
                        output::thousands(spread.median.round() as i64)
                    );
                }
                None => {
                    let _ =
                        writeln!(body, r#"<text x="{BARS_FROM}" y="{text_y}">no figure: its books are wrong</text>"#);
                }
            }
            y += ROW;
        }
    }
    y += MARGIN;
    let _ =
        writeln!(body, r#"<text x="{MARGIN}" y="{y}" class="small">{}</text>"#, escaped(&report.machine.to_string()));
    let versions: Vec<String> = report.versions.iter().map(|(name, version)| format!("{name} {version}")).collect();
    y += 18;
    let _ = writeln!(body, r#"<text x="{MARGIN}" y="{y}" class="small">{}</text>"#, escaped(&versions.join(", ")));
    let height = y + MARGIN;
    format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img">
<title>Orders a second by contestant and scenario</title>
<style>text {{ font: 14px sans-serif; fill: #222222 }} .title {{ font-size: 18px; font-weight: bold }} .group {{ font-weight: bold }} .small {{ font-size: 11px; fill: #555555 }}</style>
<rect width="100%" height="100%" fill="#ffffff"/>
{body}</svg>
"##
    )
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
