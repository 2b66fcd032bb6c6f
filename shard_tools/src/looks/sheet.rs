//! A contact sheet: thumbnails in a grid with lines of text beneath. It refuses to know datasets.

use image::{Rgb, RgbImage, imageops};
use noto_sans_mono_bitmap::{FontWeight, RasterHeight, get_raster, get_raster_width};

use super::pixels::{blend, rgb};

const MARGIN: u32 = 14;
const PICTURE_WIDTH: u32 = 240;
const PICTURE_HEIGHT: u32 = 200;
const LINE_HEIGHT: u32 = 17;
/// Lines of text beneath a picture; what is longer ends with an ellipsis.
const LINES_MAX: usize = 5;
const PAPER: Rgb<u8> = Rgb([250, 250, 248]);
const FRAME: Rgb<u8> = Rgb([232, 232, 228]);
const INK: Rgb<u8> = Rgb([32, 32, 36]);
const GREY: Rgb<u8> = Rgb([130, 130, 136]);
const BLUE: Rgb<u8> = Rgb([24, 92, 160]);
const RED: Rgb<u8> = Rgb([190, 40, 40]);
const HEIGHT: RasterHeight = RasterHeight::Size16;

/// One sample on a sheet.
pub(super) struct Cell {
    pub(super) key: String,
    /// One, or two beside each other; or why there is none.
    pub(super) images: Vec<Result<RgbImage, String>>,
    /// Texts with their labels.
    pub(super) texts: Vec<(String, Option<String>)>,
}

/// Draws `cells` in rows of `columns` under a title.
pub(super) fn draw(title: &str, cells: &[Cell], columns: u32) -> RgbImage {
    let columns = columns.min(cells.len().max(1) as u32);
    let letters = PICTURE_WIDTH as usize / letter_width() as usize;
    let lines: Vec<Vec<(String, Rgb<u8>)>> = cells.iter().map(|c| lines(c, letters)).collect();
    let cell_width = PICTURE_WIDTH + MARGIN;
    let width = columns * cell_width + MARGIN;
    // Each row is as high as its longest text needs.
    let heights: Vec<u32> = lines
        .chunks(columns as usize)
        .map(|row| row.iter().map(Vec::len).max().unwrap_or(0) as u32)
        .map(|lines| PICTURE_HEIGHT + 4 + lines * LINE_HEIGHT + MARGIN)
        .collect();
    let top = MARGIN + LINE_HEIGHT + MARGIN / 2;
    let mut sheet = RgbImage::from_pixel(width, top + heights.iter().sum::<u32>(), PAPER);
    let title = shortened(
        title,
        (width - 2 * MARGIN) as usize / letter_width() as usize,
    );
    text(&mut sheet, (MARGIN, MARGIN), &title, INK);
    let mut y = top;
    for (row, height) in heights.iter().enumerate() {
        for column in 0..columns {
            let place = row * columns as usize + column as usize;
            let Some(cell) = cells.get(place) else { break };
            let x = MARGIN + column * cell_width;
            pictures(&mut sheet, (x, y), cell);
            for (line, (words, colour)) in lines[place].iter().enumerate() {
                let y = y + PICTURE_HEIGHT + 4 + line as u32 * LINE_HEIGHT;
                text(&mut sheet, (x, y), words, *colour);
            }
        }
        y += height;
    }
    sheet
}

/// Decodes an image, small enough for a sheet; the reason where it does not decode.
pub(super) fn thumbnail(bytes: &[u8]) -> Result<RgbImage, String> {
    let image = rgb(bytes)?;
    let (width, height) = image.dimensions();
    let scale = f64::from(PICTURE_WIDTH) / f64::from(width);
    let scale = scale.min(f64::from(PICTURE_HEIGHT) / f64::from(height));
    if scale >= 1.0 {
        return Ok(image);
    }
    let side = |pixels: u32| ((f64::from(pixels) * scale).round() as u32).max(1);
    let filter = imageops::FilterType::CatmullRom;
    Ok(imageops::resize(&image, side(width), side(height), filter))
}

fn pictures(sheet: &mut RgbImage, (x, y): (u32, u32), cell: &Cell) {
    let count = cell.images.len().max(1) as u32;
    let width = (PICTURE_WIDTH - (count - 1) * 4) / count;
    for (place, image) in cell.images.iter().enumerate() {
        let x = x + place as u32 * (width + 4);
        fill(sheet, (x, y), (width, PICTURE_HEIGHT), FRAME);
        match image {
            Ok(image) => {
                let small;
                let image = if image.width() > width {
                    let height = (image.height() * width / image.width()).max(1);
                    let filter = imageops::FilterType::CatmullRom;
                    small = imageops::resize(image, width, height, filter);
                    &small
                } else {
                    image
                };
                let left = x + (width - image.width()) / 2;
                let top = y + (PICTURE_HEIGHT - image.height()) / 2;
                imageops::replace(sheet, image, i64::from(left), i64::from(top));
            }
            Err(reason) => {
                let letters = width as usize / letter_width() as usize - 1;
                let lines = wrapped(&format!("does not decode: {reason}"), letters, 8);
                for (line, words) in lines.iter().enumerate() {
                    let y = y + 8 + line as u32 * LINE_HEIGHT;
                    text(sheet, (x + 6, y), words, RED);
                }
            }
        }
    }
}

fn fill(sheet: &mut RgbImage, (x, y): (u32, u32), (width, height): (u32, u32), colour: Rgb<u8>) {
    for row in y..y + height {
        for column in x..x + width {
            sheet.put_pixel(column, row, colour);
        }
    }
}

/// The key, then texts and labels, as many as there is room for.
fn lines(cell: &Cell, letters: usize) -> Vec<(String, Rgb<u8>)> {
    let mut lines = vec![(shortened(&cell.key, letters), GREY)];
    for (place, (words, label)) in cell.texts.iter().enumerate() {
        let left = (LINES_MAX + 1).saturating_sub(lines.len());
        let needed = 1 + usize::from(label.is_some());
        if left < needed {
            let more = cell.texts.len() - place;
            lines.push((format!("… and {more} more"), GREY));
            break;
        }
        // A first text may be long, so that it is read whole; the others say that they are there.
        let room = if place == 0 { left } else { 2.min(left) } - usize::from(label.is_some());
        lines.extend(
            wrapped(words, letters, room)
                .into_iter()
                .map(|line| (line, INK)),
        );
        lines.extend(
            label
                .as_ref()
                .map(|label| (shortened(label, letters), BLUE)),
        );
    }
    lines
}

/// Text cut at white space into at most `lines` lines of at most `letters`.
fn wrapped(text: &str, letters: usize, lines: usize) -> Vec<String> {
    let mut done: Vec<String> = vec![String::new()];
    for word in text.split_whitespace() {
        let mut word: Vec<char> = word.chars().collect();
        loop {
            let line = done.last_mut().expect("begins with one");
            let used = line.chars().count();
            let gap = usize::from(used > 0);
            if used + gap + word.len() <= letters {
                line.extend(std::iter::repeat_n(' ', gap).chain(word));
                break;
            }
            // A word longer than a line is cut, others go to the next one.
            if used == 0 {
                let rest = word.split_off(letters);
                line.extend(word);
                word = rest;
            }
            done.push(String::new());
        }
    }
    if done.len() > lines {
        done.truncate(lines);
        if let Some(last) = done.last_mut() {
            *last = shortened(&format!("{last} …"), letters);
            if !last.ends_with('…') {
                last.push('…');
            }
        }
    }
    done
}

fn shortened(text: &str, letters: usize) -> String {
    if text.chars().count() <= letters {
        return text.to_owned();
    }
    let kept = text.chars().take(letters.saturating_sub(1));
    kept.chain(['…']).collect()
}

fn letter_width() -> u32 {
    get_raster_width(FontWeight::Regular, HEIGHT) as u32
}

/// One line. A letter that the font has not is drawn as a hollow box, so that it is seen to be there.
fn text(sheet: &mut RgbImage, (x, y): (u32, u32), words: &str, colour: Rgb<u8>) {
    for (place, letter) in words.chars().enumerate() {
        let x = x + place as u32 * letter_width();
        match letter {
            '…' => ellipsis(sheet, (x, y), colour),
            letter => match get_raster(plain(letter), FontWeight::Regular, HEIGHT) {
                Some(raster) => {
                    for (dy, row) in raster.rows().enumerate() {
                        for (dx, alpha) in row.iter().enumerate() {
                            dot(sheet, (x + dx as u32, y + dy as u32), colour, *alpha);
                        }
                    }
                }
                None => hollow_box(sheet, (x, y), colour),
            },
        }
    }
}

/// Curly quotes and dashes, which captions are full of, as the font has them.
fn plain(letter: char) -> char {
    match letter {
        '\u{2018}' | '\u{2019}' => '\'',
        '\u{201c}' | '\u{201d}' => '"',
        '\u{2010}'..='\u{2015}' => '-',
        letter => letter,
    }
}

fn dot(sheet: &mut RgbImage, (x, y): (u32, u32), colour: Rgb<u8>, alpha: u8) {
    if let Some(pixel) = sheet.get_pixel_mut_checked(x, y) {
        for (under, over) in pixel.0.iter_mut().zip(colour.0) {
            *under = blend(*under, over, alpha);
        }
    }
}

fn ellipsis(sheet: &mut RgbImage, (x, y): (u32, u32), colour: Rgb<u8>) {
    for dx in [0, 3, 6] {
        dot(sheet, (x + dx, y + 11), colour, 255);
        dot(sheet, (x + dx, y + 12), colour, 160);
    }
}

fn hollow_box(sheet: &mut RgbImage, (x, y): (u32, u32), colour: Rgb<u8>) {
    let (right, top, bottom) = (letter_width() - 2, 3, 12);
    for dx in 0..=right {
        dot(sheet, (x + dx, y + top), colour, 150);
        dot(sheet, (x + dx, y + bottom), colour, 150);
    }
    for dy in top + 1..bottom {
        dot(sheet, (x, y + dy), colour, 150);
        dot(sheet, (x + right, y + dy), colour, 150);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_wrapped_and_cut() {
        assert_eq!(
            wrapped("a red bus in Rome", 8, 3),
            ["a red", "bus in", "Rome"]
        );
        assert_eq!(wrapped("a red bus in Rome", 8, 2), ["a red", "bus in …"]);
        assert_eq!(wrapped("abcdefghij k", 4, 9), ["abcd", "efgh", "ij k"]);
        assert_eq!(wrapped("", 4, 9), [""]);
        assert_eq!(shortened("abcdef", 4), "abc…");
    }

    #[test]
    fn every_letter_leaves_a_mark() {
        for letter in ["A", "é", "ł", "…", "漢", "🚌"] {
            let mut sheet = RgbImage::from_pixel(20, 20, PAPER);
            text(&mut sheet, (2, 2), letter, INK);
            let marked = sheet.pixels().filter(|pixel| **pixel != PAPER).count();
            assert!(marked > 5, "{letter} leaves {marked} pixels");
        }
    }
}
