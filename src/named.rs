//! Enums by name, as the command line, configuration files and error messages have them.

/// Gives an enum of unit variants `ALL`, `FromStr`, `Display` and serde through the names written here.
macro_rules! named {
    ($kind:ident, $what:literal, { $($variant:ident => $name:literal),+ $(,)? }) => {
        impl $kind {
            /// Every kind, in the order error messages list them.
            pub const ALL: &[$kind] = &[$($kind::$variant),+];

            /// Its name.
            pub const fn name(self) -> &'static str {
                match self {
                    $($kind::$variant => $name),+
                }
            }
        }

        impl std::str::FromStr for $kind {
            type Err = $crate::Error;
            fn from_str(s: &str) -> $crate::Result<Self> {
                $kind::ALL.iter().copied().find(|kind| kind.name() == s).ok_or_else(|| {
                    let known: Vec<&str> = $kind::ALL.iter().map(|kind| kind.name()).collect();
                    $crate::Error::Config(format!("unknown {} {s:?}: it is one of {}", $what, known.join(", ")))
                })
            }
        }

        impl std::fmt::Display for $kind {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(self.name())
            }
        }

        impl serde::Serialize for $kind {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.name())
            }
        }

        impl<'de> serde::Deserialize<'de> for $kind {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let name = String::deserialize(deserializer)?;
                name.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}
pub(crate) use named;
