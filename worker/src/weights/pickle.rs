//! A pickle reader that can only build data.
//!
//! A pickle is a program for a small stack machine; Python's own machine imports and calls whatever
//! the program names. This one knows plain data (numbers, strings, tuples, lists, dicts) and the few
//! names that tensors need. **Every other name becomes an inert value**: calling it, building it or
//! filling it gives an inert value again, and nothing is ever looked up or run. So the rest of a
//! Lightning checkpoint (hyper-parameters, callbacks, optimizer) is walked over, and an inert value
//! is refused only where a weight is needed. Names that exist to run commands end the reading at
//! once: they could not do harm here, but would in the next program that opens the file.
//!
//! Bounds: every step consumes a byte of a pickle of at most [`PICKLE_BYTES_MAX`] and makes at most
//! one value, so time and memory are linear in the pickle's length. Values are shared by index, so
//! cycles and aliases cost nothing. It refuses to know zip archives and files.

use std::collections::HashMap;

/// Largest `data.pkl`: a checkpoint of ten thousand tensors with optimizer has under 4 MB.
pub(crate) const PICKLE_BYTES_MAX: u64 = 16 << 20;
/// Longest module, class or record name: they are copied where the pickle only refers to them.
const NAME_BYTES_MAX: usize = 255;
/// Axes of a tensor.
const RANK_MAX: usize = 16;

/// Modules whose names run commands, read files or load code when called.
const DANGEROUS_MODULES: [&str; 15] = [
    "os",
    "posix",
    "nt",
    "subprocess",
    "sys",
    "socket",
    "shutil",
    "ctypes",
    "importlib",
    "runpy",
    "pty",
    "code",
    "codeop",
    "webbrowser",
    "pip",
];
/// The same among Python's built-in functions.
const DANGEROUS_BUILTINS: [&str; 8] = [
    "eval",
    "exec",
    "execfile",
    "compile",
    "open",
    "input",
    "__import__",
    "breakpoint",
];

/// Type of a tensor's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Element {
    F16,
    Bf16,
    F32,
    F64,
    /// Integers and booleans: legal in a file, never a weight.
    Whole {
        bytes: usize,
    },
}

impl Element {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            Element::F16 | Element::Bf16 => 2,
            Element::F32 => 4,
            Element::F64 => 8,
            Element::Whole { bytes } => bytes,
        }
    }

    /// PyTorch's class of a storage of this type.
    fn of_storage(class: &str) -> Option<Self> {
        Some(match class {
            "HalfStorage" => Element::F16,
            "BFloat16Storage" => Element::Bf16,
            "FloatStorage" => Element::F32,
            "DoubleStorage" => Element::F64,
            "LongStorage" => Element::Whole { bytes: 8 },
            "IntStorage" => Element::Whole { bytes: 4 },
            "ShortStorage" => Element::Whole { bytes: 2 },
            "CharStorage" | "ByteStorage" | "BoolStorage" => Element::Whole { bytes: 1 },
            _ => return None,
        })
    }
}

/// A storage: one record of the archive.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Storage {
    pub element: Element,
    /// Name of the record below `data/`.
    pub record: String,
    /// Elements in it.
    pub elements: usize,
}

/// A view of a storage. All indices it can reach lie inside.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct View {
    pub storage: Storage,
    /// First element.
    pub offset: usize,
    pub shape: Vec<usize>,
    /// In elements, one per axis; 0 repeats.
    pub strides: Vec<usize>,
}

/// Index of a value.
pub(crate) type Id = u32;

/// A value of the pickle.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value {
    /// None, booleans, floats, bytes: nothing that a weight needs.
    Plain(&'static str),
    Int(i64),
    Text(String),
    Tuple(Vec<Id>),
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    Name(Name),
    Storage(Storage),
    Tensor(Box<View>),
    /// Something of an unknown class; `state` is what it was built with.
    Inert {
        class: String,
        state: Option<Id>,
    },
}

/// A global name.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Name {
    RebuildTensor,
    RebuildParameter,
    OrderedDict,
    StorageOf(Element),
    Other(String),
}

/// What the machine left: all values and the one on top.
#[derive(Debug)]
pub(crate) struct Pickle {
    values: Vec<Value>,
    root: Id,
}

impl Pickle {
    pub fn root(&self) -> &Value {
        self.get(self.root)
    }

    pub fn get(&self, id: Id) -> &Value {
        &self.values[id as usize]
    }
}

/// Why reading ended early.
#[derive(Debug, PartialEq)]
pub(crate) struct Stop {
    /// Byte of the pickle.
    pub offset: usize,
    pub why: Why,
}

#[derive(Debug, PartialEq)]
pub(crate) enum Why {
    /// Damaged, or beyond what this reader knows.
    Bad(String),
    /// A name that runs commands.
    Dangerous(String),
}

/// Reads one pickle.
pub(crate) fn read(bytes: &[u8]) -> Result<Pickle, Stop> {
    let mut machine = Machine {
        bytes,
        at: 0,
        values: Vec::new(),
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
    };
    loop {
        let offset = machine.at;
        match machine.step() {
            Ok(None) => {}
            Ok(Some(root)) => {
                let values = machine.values;
                return Ok(Pickle { values, root });
            }
            Err(why) => return Err(Stop { offset, why }),
        }
    }
}

type Step<T> = Result<T, Why>;

fn bad<T>(reason: impl Into<String>) -> Step<T> {
    Err(Why::Bad(reason.into()))
}

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    values: Vec<Value>,
    stack: Vec<Id>,
    /// Heights of the stack at which a mark was set.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
}

impl Machine<'_> {
    /// One operation; the root at STOP.
    fn step(&mut self) -> Step<Option<Id>> {
        let op = self.take(1)?[0];
        match op {
            // PROTO, FRAME
            0x80 => drop(self.take(1)?),
            0x95 => drop(self.take(8)?),
            b'.' => return self.pop().map(Some),
            b'(' => self.marks.push(self.stack.len()),
            b'0' => drop(self.pop()?),
            b'1' => drop(self.pop_mark()?),
            b'2' => {
                let top = *self.stack.last().ok_or_else(empty)?;
                self.stack.push(top);
            }
            b'N' => self.push(Value::Plain("None")),
            0x88 | 0x89 => self.push(Value::Plain("a boolean")),
            b'G' => {
                self.take(8)?;
                self.push(Value::Plain("a float"));
            }
            b'J' | b'K' | b'M' | 0x8a | 0x8b => self.integer(op)?,
            b'X' | 0x8c | 0x8d => self.text(op)?,
            b'C' | b'B' | b'U' | b'T' | 0x8e | 0x96 => self.raw(op)?,
            b')' | b't' | 0x85..=0x87 => self.tuple(op)?,
            b']' => self.push(Value::List(Vec::new())),
            b'l' => {
                let items = self.pop_mark()?;
                self.push(Value::List(items));
            }
            b'}' => self.push(Value::Dict(Vec::new())),
            b'd' => {
                let items = pairs(&self.pop_mark()?)?;
                self.push(Value::Dict(items));
            }
            0x8f => self.push(inert("set")),
            0x91 => {
                self.pop_mark()?;
                self.push(inert("frozenset"));
            }
            b'a' | b'e' | 0x90 | b's' | b'u' => self.fill(op)?,
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.global(&module, &name)?;
            }
            0x93 => {
                let (name, module) = (self.pop_text()?, self.pop_text()?);
                self.global(&module, &name)?;
            }
            b'R' | 0x81 | 0x92 => self.call(op)?,
            b'b' => self.build()?,
            b'Q' => self.persistent()?,
            b'q' | b'r' | 0x94 | b'h' | b'j' => self.memory(op)?,
            _ => return bad(format!("operation 0x{op:02x} is not one that tensors need")),
        }
        Ok(None)
    }

    fn take(&mut self, count: usize) -> Step<&[u8]> {
        let rest = &self.bytes[self.at..];
        let Some(taken) = rest.get(..count) else {
            return bad(format!("ends {} bytes early", count - rest.len()));
        };
        self.at += count;
        Ok(taken)
    }

    /// A little-endian count of `bytes` bytes.
    fn count(&mut self, bytes: usize) -> Step<usize> {
        let mut wide = [0u8; 8];
        wide[..bytes].copy_from_slice(self.take(bytes)?);
        usize::try_from(u64::from_le_bytes(wide)).or_else(|_| bad("a length beyond this machine"))
    }

    fn line(&mut self) -> Step<String> {
        let rest = &self.bytes[self.at..];
        let Some(end) = rest.iter().position(|b| *b == b'\n') else {
            return bad("a name without end");
        };
        let line = &rest[..end];
        self.at += end + 1;
        std::str::from_utf8(line).map_or_else(|_| bad("a name that is not UTF-8"), short)
    }

    fn push(&mut self, value: Value) {
        // A step consumes at least one byte, so the bound on bytes bounds this index.
        self.stack.push(self.values.len() as Id);
        self.values.push(value);
    }

    fn pop(&mut self) -> Step<Id> {
        if self.marks.last() == Some(&self.stack.len()) {
            return Err(empty());
        }
        self.stack.pop().ok_or_else(empty)
    }

    fn pop_mark(&mut self) -> Step<Vec<Id>> {
        let mark = self.marks.pop().ok_or_else(empty)?;
        if mark > self.stack.len() {
            return Err(empty());
        }
        Ok(self.stack.split_off(mark))
    }

    fn get(&self, id: Id) -> &Value {
        &self.values[id as usize]
    }

    fn pop_text(&mut self) -> Step<String> {
        let id = self.pop()?;
        match self.get(id) {
            Value::Text(text) => short(text),
            other => bad(format!("a name is {}", describe(other))),
        }
    }

    fn integer(&mut self, op: u8) -> Step<()> {
        let value = match op {
            b'J' => {
                let raw = self.take(4)?.try_into().expect("four bytes were taken");
                Value::Int(i32::from_le_bytes(raw).into())
            }
            b'K' => Value::Int(self.count(1)? as i64),
            b'M' => Value::Int(self.count(2)? as i64),
            _ => {
                let length = self.count(if op == 0x8a { 1 } else { 4 })?;
                let raw = self.take(length)?;
                if length > 8 {
                    Value::Plain("a large integer")
                } else {
                    // Two's complement, as short as it goes.
                    let negative = raw.last().is_some_and(|b| b & 0x80 != 0);
                    let mut wide = [if negative { 0xff } else { 0 }; 8];
                    wide[..length].copy_from_slice(raw);
                    Value::Int(i64::from_le_bytes(wide))
                }
            }
        };
        self.push(value);
        Ok(())
    }

    fn text(&mut self, op: u8) -> Step<()> {
        let length = self.count(match op {
            b'X' => 4,
            0x8c => 1,
            _ => 8,
        })?;
        let raw = self.take(length)?.to_vec();
        // Python may store lone surrogates, which no key of a weight has.
        let value = String::from_utf8(raw).map_or(Value::Plain("odd text"), Value::Text);
        self.push(value);
        Ok(())
    }

    fn raw(&mut self, op: u8) -> Step<()> {
        let length = self.count(match op {
            b'C' | b'U' => 1,
            b'B' | b'T' => 4,
            _ => 8,
        })?;
        self.take(length)?;
        self.push(Value::Plain("bytes"));
        Ok(())
    }

    fn tuple(&mut self, op: u8) -> Step<()> {
        let items = match op {
            b')' => Vec::new(),
            b't' => self.pop_mark()?,
            _ => {
                let mut items = Vec::new();
                for _ in 0x84..op {
                    items.push(self.pop()?);
                }
                items.reverse();
                items
            }
        };
        self.push(Value::Tuple(items));
        Ok(())
    }

    /// Puts items into the container below them; inert containers swallow theirs.
    fn fill(&mut self, op: u8) -> Step<()> {
        let items = match op {
            b'a' => vec![self.pop()?],
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                vec![key, value]
            }
            _ => self.pop_mark()?,
        };
        let target = *self.stack.last().ok_or_else(empty)?;
        let keyed = matches!(op, b's' | b'u');
        match &mut self.values[target as usize] {
            Value::List(list) if !keyed => list.extend(items),
            Value::Dict(dict) if keyed => dict.extend(pairs(&items)?),
            Value::Inert { .. } => {}
            other => return bad(format!("items for {}", describe(other))),
        }
        Ok(())
    }

    fn global(&mut self, module: &str, name: &str) -> Step<()> {
        let top = module.split('.').next().unwrap_or(module);
        let builtin = matches!(module, "builtins" | "__builtin__");
        if DANGEROUS_MODULES.contains(&top) || builtin && DANGEROUS_BUILTINS.contains(&name) {
            return Err(Why::Dangerous(format!("{module}.{name}")));
        }
        let known = match (module, name) {
            ("torch._utils", "_rebuild_tensor_v2" | "_rebuild_tensor") => Name::RebuildTensor,
            ("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state") => {
                Name::RebuildParameter
            }
            ("collections", "OrderedDict") => Name::OrderedDict,
            ("torch", class) => match Element::of_storage(class) {
                Some(element) => Name::StorageOf(element),
                None => Name::Other(format!("{module}.{name}")),
            },
            _ => Name::Other(format!("{module}.{name}")),
        };
        self.push(Value::Name(known));
        Ok(())
    }

    /// REDUCE, NEWOBJ, NEWOBJ_EX: a name applied to arguments. Applied means: looked at.
    fn call(&mut self, op: u8) -> Step<()> {
        if op == 0x92 {
            self.pop()?;
        }
        let (arguments, callee) = (self.pop()?, self.pop()?);
        let Value::Tuple(items) = self.get(arguments) else {
            return bad("arguments that are not a tuple");
        };
        let value = match self.get(callee) {
            Value::Name(Name::RebuildTensor) => self.tensor(items)?,
            Value::Name(Name::RebuildParameter) => match items.first().copied() {
                Some(inner) => {
                    self.stack.push(inner);
                    return Ok(());
                }
                None => return bad("a parameter without its tensor"),
            },
            Value::Name(Name::OrderedDict) if items.is_empty() => Value::Dict(Vec::new()),
            // Filled by its constructor: copying the items would let a small file grow large.
            Value::Name(Name::OrderedDict) => inert("collections.OrderedDict with arguments"),
            Value::Name(Name::StorageOf(_)) => inert("a bare storage"),
            Value::Name(Name::Other(class)) | Value::Inert { class, .. } => inert(class),
            other => return bad(format!("{} is called", describe(other))),
        };
        self.push(value);
        Ok(())
    }

    fn build(&mut self) -> Step<()> {
        let state = self.pop()?;
        let target = *self.stack.last().ok_or_else(empty)?;
        // Dicts and tensors get attributes here (`_metadata`), which no weight needs.
        if let Value::Inert { state: held, .. } = &mut self.values[target as usize] {
            *held = Some(state);
        }
        Ok(())
    }

    /// `('storage', type, record, device, elements)`.
    fn persistent(&mut self) -> Step<()> {
        let id = self.pop()?;
        let Value::Tuple(parts) = self.get(id) else {
            return bad("a persistent id that is not a tuple");
        };
        let parts = self.few(parts)?;
        let [
            Value::Text(kind),
            class,
            Value::Text(record),
            _,
            Value::Int(elements),
            ..,
        ] = parts.as_slice()
        else {
            return bad("a persistent id that is not a storage");
        };
        if kind != "storage" {
            return bad(format!("a persistent id of kind `{kind}`"));
        }
        let value = match class {
            Value::Name(Name::StorageOf(element)) => Value::Storage(Storage {
                element: *element,
                record: short(record)?,
                elements: natural(*elements)?,
            }),
            Value::Name(Name::Other(class)) => inert(class),
            other => return bad(format!("a storage's type is {}", describe(other))),
        };
        self.push(value);
        Ok(())
    }

    /// `(storage, offset, shape, strides, …)`.
    fn tensor(&self, arguments: &[Id]) -> Step<Value> {
        let parts = self.few(arguments)?;
        let [
            storage,
            Value::Int(offset),
            Value::Tuple(shape),
            Value::Tuple(strides),
            ..,
        ] = parts.as_slice()
        else {
            return bad("a tensor without storage, offset, shape and strides");
        };
        let storage = match storage {
            Value::Storage(storage) => storage.clone(),
            Value::Inert { class, .. } => return Ok(inert(&format!("a tensor of {class}"))),
            other => return bad(format!("a tensor's storage is {}", describe(other))),
        };
        let view = View {
            storage,
            offset: natural(*offset)?,
            shape: self.naturals(shape)?,
            strides: self.naturals(strides)?,
        };
        if view.shape.len() != view.strides.len() {
            return bad(format!(
                "a tensor of shape {:?} with strides {:?}",
                view.shape, view.strides
            ));
        }
        match (elements(&view.shape), reach(&view)) {
            (Some(0), _) => Ok(Value::Tensor(Box::new(view))),
            (Some(_), Some(last)) if last < view.storage.elements => {
                Ok(Value::Tensor(Box::new(view)))
            }
            _ => bad(format!(
                "a tensor of shape {:?}, strides {:?} and offset {} reaches beyond its storage of \
                 {} elements",
                view.shape, view.strides, view.offset, view.storage.elements
            )),
        }
    }

    /// The values of a short tuple. Long ones are no tensor's, and looking at one again and again
    /// would cost more than the pickle's length.
    fn few(&self, ids: &[Id]) -> Step<Vec<&Value>> {
        if ids.len() > RANK_MAX {
            return bad(format!("{} parts where a tensor has few", ids.len()));
        }
        Ok(ids.iter().map(|id| self.get(*id)).collect())
    }

    fn naturals(&self, ids: &[Id]) -> Step<Vec<usize>> {
        let one = |value: &Value| match value {
            Value::Int(n) => natural(*n),
            other => bad(format!("a size is {}", describe(other))),
        };
        self.few(ids)?.into_iter().map(one).collect()
    }

    fn memory(&mut self, op: u8) -> Step<()> {
        let slot = match op {
            b'q' | b'h' => self.count(1)?,
            b'r' | b'j' => self.count(4)?,
            _ => self.memo.len(),
        } as u32;
        if matches!(op, b'h' | b'j') {
            let Some(id) = self.memo.get(&slot) else {
                return bad(format!("memo {slot} was never written"));
            };
            self.stack.push(*id);
        } else {
            let top = *self.stack.last().ok_or_else(empty)?;
            self.memo.insert(slot, top);
        }
        Ok(())
    }
}

fn empty() -> Why {
    Why::Bad("takes more from the stack than is there".into())
}

fn inert(class: &str) -> Value {
    Value::Inert {
        class: class.to_owned(),
        state: None,
    }
}

fn short(name: &str) -> Step<String> {
    if name.len() > NAME_BYTES_MAX {
        return bad(format!("a name of {} bytes", name.len()));
    }
    Ok(name.to_owned())
}

fn natural(n: i64) -> Step<usize> {
    usize::try_from(n).or_else(|_| bad(format!("a size is {n}")))
}

/// Product of `shape`, unless it is beyond this machine.
pub(crate) fn elements(shape: &[usize]) -> Option<usize> {
    shape
        .iter()
        .try_fold(1usize, |n, axis| n.checked_mul(*axis))
}

/// The highest index a non-empty view touches.
fn reach(view: &View) -> Option<usize> {
    let mut last = view.offset;
    for (axis, stride) in view.shape.iter().zip(&view.strides) {
        last = last.checked_add(axis.checked_sub(1)?.checked_mul(*stride)?)?;
    }
    Some(last)
}

fn pairs(items: &[Id]) -> Step<Vec<(Id, Id)>> {
    let (pairs, rest) = items.as_chunks::<2>();
    if !rest.is_empty() {
        return bad("a key without a value");
    }
    Ok(pairs.iter().map(|[key, value]| (*key, *value)).collect())
}

/// What a value is, in words for errors.
pub(crate) fn describe(value: &Value) -> String {
    match value {
        Value::Plain(what) => (*what).into(),
        Value::Int(n) => format!("the integer {n}"),
        Value::Text(_) => "text".into(),
        Value::Tuple(_) => "a tuple".into(),
        Value::List(_) => "a list".into(),
        Value::Dict(_) => "a dict".into(),
        Value::Name(_) => "a name".into(),
        Value::Storage(_) => "a storage".into(),
        Value::Tensor(_) => "a tensor".into(),
        Value::Inert { class, .. } => format!("an object of `{class}`, which is never executed"),
    }
}

#[cfg(test)]
mod tests;
